"""The page that a training run leaves."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from widefield.data import LabelledImages
from widefield.models import Classifier
from widefield.reports import Page, plain_step_bytes
from widefield.reports.figures import as_png


def write_training_report(
    out: Path, model: Classifier, data: LabelledImages, rows: list[dict[str, float]], peak: int | None
) -> None:
    """Write `out/report.html`: what was trained on what, how it is streamed, and the numbers of every epoch.

    Args:
        peak: Measured peak memory of a training step above that between steps, in bytes, if known.
    """
    page = Page(f"Training of {model.hparams['model_name']}")
    sizes = (f"{len(data.train_set)} images for training", f"{len(data.val_set)} for validation")
    page.paragraph(f"{', '.join(sizes)}; classes {', '.join(model.class_names)}; level {data.level}.")
    page.heading("Numbers of every epoch")
    if rows:
        page.picture(_curves(rows), "Loss and metrics by epoch")
        page.table(list(rows[0]), [list(row.values()) for row in rows])
    page.heading("Memory")
    image = max((image for image, _ in data.train_set), key=lambda image: image.shape[1] * image.shape[2])
    plain = plain_step_bytes(model.stream_network.module, image.shape)
    page.code(str(model.stream_network.plan(image.shape)))
    page.table(["one training step on the largest image", "bytes"], memory_rows(peak, plain))
    page.write(out / "report.html")
    memory = {"streamed_peak_bytes": peak, "plain_step_bytes": plain}
    (out / "memory.json").write_text(json.dumps(memory), encoding="utf-8")


def memory_rows(peak: int | None, plain: int) -> list[tuple[str, str]]:
    """Rows for a table: the measured peak, and what a plain step would have kept."""
    return [
        ("streamed: measured peak, above the memory between steps", "unknown" if peak is None else mebibytes(peak)),
        ("plain: computed, the activations that autograd keeps for the backward pass", mebibytes(plain)),
    ]


def mebibytes(size: int) -> str:
    """`size` bytes as text, in MiB."""
    return f"{size / 2**20:.0f} MiB"


def _curves(rows: list[dict[str, float]]) -> bytes:
    figure = Figure(figsize=(8, 3), dpi=110, layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("loss", ""), strict=True):
        for name in rows[0]:
            if name != "epoch" and name.endswith("loss") == bool(kind):
                axes.plot([row["epoch"] for row in rows], [row.get(name) for row in rows], marker=".", label=name)
        axes.set_xlabel("epoch")
        axes.legend(fontsize=8)
    return as_png(figure)
