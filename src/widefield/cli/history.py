"""Records that `fit` keeps of a run: the numbers of every epoch, the memory of a step, and the page about them."""

import csv
import io
import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure

from widefield.cli.predict_maps import predict_map
from widefield.data import LazyImages
from widefield.images import LabelMap, open_image
from widefield.models import FromCheckpoint, Segmenter
from widefield.reports import Page, PeakMemory, plain_step_bytes
from widefield.reports.figures import as_png
from widefield.reports.label_overlay import label_overlay
from widefield.writing import replacing

_log = logging.getLogger(__name__)
_SHOWN = 3
"""Images whose label maps a report shows."""


class History(Callback):
    """Collects the logged numbers of each epoch and writes them to a CSV file; a resumed run goes on with its rows.

    Attributes:
        rows: The numbers of each epoch.
        has_started: Whether training began, all that a checkpoint holds being loaded.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.has_started = False
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.has_started = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        numbers = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        self.rows.append({"epoch": trainer.current_epoch + 1, **numbers})
        if trainer.is_global_zero:
            write_csv(self._path, self.rows)
        lost = [name for name, value in numbers.items() if name.endswith("loss") and not math.isfinite(value)]
        if lost:
            _log.warning("%s is no number any more; try a smaller learning rate, or 32 bits", " and ".join(lost))
        shown = ", ".join(f"{name} {value:.3f}" for name, value in numbers.items())
        _log.info("epoch %d of %s: %s", trainer.current_epoch + 1, trainer.max_epochs, shown)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write `rows`, which share their keys, with a header; whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with replacing(path) as partial:
        partial.write_text(text.getvalue(), encoding="utf-8")


class StepMemory(Callback):
    """Measures the peak memory of training steps above that between them, from the second one on.

    The first one leaves what is there between all others: gradients, the optimizer's state, code that had not run before.
    `peak` is in bytes; None after less than two steps, and where the system does not tell.
    """

    def __init__(self) -> None:
        self.peak: int | None = None
        self._memory: PeakMemory | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._memory is None and trainer.global_step > 0:
            self._memory = PeakMemory(trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        found = None if self._memory is None else self._memory.bytes_above_start()
        if found is not None:
            self.peak = max(found, self.peak or 0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._memory = None  # what a validation needs does not count


def _scale(data: Any) -> str:
    spacing, level = data.options["spacing"], data.options["level"]
    return f"level {level or 0}" if spacing is None else f"{spacing:g} micrometres per pixel"


def write_training_report(
    out: Path, model: FromCheckpoint, data: LazyImages, rows: list[dict[str, float]], peak: int | None
) -> None:
    """Write `out/report.html`: what was trained on what, how it is streamed, and the numbers of every epoch.

    Args:
        peak: Measured peak memory of a training step above that between steps, in bytes, if known.
    """
    page = Page(f"Training of {model.hparams['model_name']}")
    sizes = (f"{len(data.train_set)} images for training", f"{len(data.val_set)} for validation")
    page.paragraph(f"{', '.join(sizes)}; {data.described}; {_scale(data)}.")
    page.heading("Numbers of every epoch")
    if rows:
        page.picture(_curves(rows), "Loss and metrics by epoch")
        page.table(list(rows[0]), [list(row.values()) for row in rows])
    if not model.reads_pixels:
        page.write(out / "report.html")
        return
    if isinstance(model, Segmenter):
        add_label_maps(page, model, data)
    page.heading("Memory")
    image, target = max(data.train_set, key=lambda pair: pair[0].shape[1] * pair[0].shape[2])
    maps = [target] if isinstance(target, LabelMap) else []
    plain = plain_step_bytes(model.stream_network.module, image.shape)
    page.code(str(model.stream_network.plan(image.shape, *maps)))
    page.table(["one training step on the largest image", "bytes"], memory_rows(peak, plain))
    page.write(out / "report.html")
    memory = {"streamed_peak_bytes": peak, "plain_step_bytes": plain}
    (out / "memory.json").write_text(json.dumps(memory), encoding="utf-8")


def add_label_maps(page: Page, model: Segmenter, data: LazyImages) -> None:
    """Add the confusion matrix of the last validation, and validation images with their labels and with what is predicted."""
    names = model.class_names
    if (matrix := model.tables.get("val_confusion_matrix")) is not None:
        page.heading("Confusion matrix of the last validation, in pixels")
        page.table(["true class", *names], [[name, *row] for name, row in zip(names, matrix.tolist(), strict=True)])
    page.heading("Label maps of validation images")
    pairs: Any = [data.val_set[k] for k in range(min(_SHOWN, len(data.val_set)))]
    with tempfile.TemporaryDirectory(prefix="widefield-") as folder:
        for k, (image, labels) in enumerate(pairs):
            predicted = Path(folder) / f"{k}.tif"
            predict_map(model, image, predicted, None)
            for what, shown in (("labels", labels), ("predicted", open_image(predicted))):
                title = f"{image.path.name}: {what}"
                page.picture(as_png(label_overlay(image, shown, names, title)), title)


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
