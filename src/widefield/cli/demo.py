"""The demo: images, training and prediction at full resolution and on thumbnails, and the report that compares them."""

import argparse
import csv
import itertools
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torchmetrics.functional.classification import binary_auroc

from widefield.cli import main
from widefield.cli.demo_images import CLASSES, CLUSTER_RADIUS, CLUSTERS, SIDE, SPACING, THUMBNAIL, Made, make_images
from widefield.cli.run import console
from widefield.cli.training_report import memory_rows
from widefield.reports import Page, ProgressLine
from widefield.streaming.budget import format_bytes

_log = logging.getLogger(__name__)
MODEL = "resnet10_w16"
STRIDE = 32
"""Pixels of the image per entry of the network's last map."""
_TRAINING_IMAGES, _HELD_OUT_IMAGES = 24, 16
_EPOCHS = 3
_SETTINGS = f"--model {MODEL} --model.pooling max --lr 0.001 --epochs {_EPOCHS} --memory-budget 64MiB".split()
"""Without a budget, all the memory that is free would be used to save time."""
_SHOWN = 6
"""Overlays in the report."""


@dataclass(frozen=True)
class Outcome:
    """Predictions for the held-out images, in the order they were made."""

    auc: float
    peaks: tuple[tuple[int, int], ...]
    """(y, x) where the evidence for the predicted class is greatest."""
    predicted: tuple[str, ...]
    overlays: tuple[Path, ...]


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Make the images, run `fit` and `predict` on them and on their thumbnails, and write `report.html` in `arguments.out`.

    Raises:
        FileExistsError: The folder is there and not empty.
        MissingExtraError: scikit-image is not installed.
    """
    out, seed = arguments.out, arguments.seed
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} already exists; name another folder with --out DIR, or remove it")
    start = time.monotonic()
    held_out = _make_data(out, seed)
    full = _train_and_predict(out, "full-resolution", "images", held_out, seed)
    small = _train_and_predict(out, "thumbnails", "thumbnails", held_out, seed)
    memory = json.loads((out / "full-resolution" / "memory.json").read_text(encoding="utf-8"))
    peak, plain = memory["streamed_peak_bytes"], memory["plain_step_bytes"]
    seconds = time.monotonic() - start
    _write_report(out, held_out, full, small, memory_rows(peak, plain), seconds)
    hits, positives = _hits(held_out, full)
    console.print(
        f"held-out AUC at full resolution {full.auc:.3f}, on thumbnails of {THUMBNAIL} pixels {small.auc:.3f}"
    )
    console.print(f"the heatmap's maximum lies on a mark in {hits} of {positives} speckled images")
    console.print(
        f"peak memory of a training step, above that between steps (measured): {'unknown' if peak is None else format_bytes(peak)}"
    )
    console.print(f"a plain step would keep, in activations alone (computed): {format_bytes(plain)}")
    console.print(f"report: {out / 'report.html'} (after {seconds:.0f} s)", soft_wrap=True)


def _make_data(out: Path, seed: int) -> list[Made]:
    """Training and held-out images under `out/data`; the held-out ones."""
    made = itertools.count(1)
    with ProgressLine(console=console) as line:

        def tell() -> None:
            line.update(next(made), _TRAINING_IMAGES + _HELD_OUT_IMAGES, "images are made")

        make_images(out / "data" / "training", _TRAINING_IMAGES, 2 * seed, tell)
        held_out = make_images(out / "data" / "held-out", _HELD_OUT_IMAGES, 2 * seed + 1, tell)
    _log.info("made %d images of %d x %d pixels", _TRAINING_IMAGES + _HELD_OUT_IMAGES, SIDE, SIDE)
    return held_out


def _train_and_predict(out: Path, name: str, kind: str, held_out: Sequence[Made], seed: int) -> Outcome:
    """Run `fit` into `out/name` and `predict` into `out/name/predictions`, on the data folders' subfolder `kind`."""
    training, run = out / "data" / "training", out / name
    _widefield(
        "fit",
        *("--images", training / kind, "--labels", training / "labels.csv", "--out", run, "--seed", seed),
        *_SETTINGS,
    )
    predictions = run / "predictions"
    _widefield("predict", "--checkpoint", run / "best.ckpt", "--out", predictions, out / "data" / "held-out" / kind)
    return _read_outcome(predictions, held_out)


def _widefield(*arguments: object) -> None:
    """Run a command of `widefield`, shown as a user would type it."""
    words = [str(argument) for argument in arguments]
    _log.info("widefield %s", " ".join(words))
    if main(words) != 0:
        raise ValueError(f"`widefield {words[0]}` failed, see above")


def _read_outcome(predictions: Path, held_out: Sequence[Made]) -> Outcome:
    with (predictions / "predictions.csv").open(newline="", encoding="utf-8") as file:
        by_name = {Path(row["image"]).stem: row for row in csv.DictReader(file)}
    rows = [by_name[image.name] for image in held_out]
    scores = torch.tensor([float(row[f"probability_{CLASSES[1]}"]) for row in rows], dtype=torch.float64)
    truth = torch.tensor([CLASSES.index(image.label) for image in held_out])
    return Outcome(
        float(binary_auroc(scores, truth)),
        tuple((int(row["peak_y"]), int(row["peak_x"])) for row in rows),
        tuple(row["predicted"] for row in rows),
        tuple(predictions / row["overlay"] for row in rows),
    )


def _hits(held_out: Sequence[Made], outcome: Outcome) -> tuple[int, int]:
    """In how many speckled images the evidence for "speckled" is greatest on a mark, and how many there are.

    On a mark: within the cluster's radius of its centre, give or take one entry of the map.
    """
    positives = [index for index, image in enumerate(held_out) if image.label == CLASSES[1]]
    hits = 0
    for index in positives:
        y, x = outcome.peaks[index]
        nearest = min(math.hypot(y - mark_y, x - mark_x) for mark_y, mark_x in held_out[index].speckled)
        hits += outcome.predicted[index] == CLASSES[1] and nearest <= CLUSTER_RADIUS + STRIDE
    return hits, len(positives)


def _write_report(
    out: Path, held_out: Sequence[Made], full: Outcome, small: Outcome, memory: list[tuple[str, str]], seconds: float
) -> None:
    hits, positives = _hits(held_out, full)
    marks = len(next(image.speckled for image in held_out if image.speckled))
    chance = marks * math.pi * (CLUSTER_RADIUS + STRIDE) ** 2 / SIDE**2
    page = Page("Widefield demo")
    page.paragraph(
        f"{_TRAINING_IMAGES} images for training and {_HELD_OUT_IMAGES} held out, each {SIDE} x {SIDE} pixels at {SPACING} µm, "
        "composed from a photograph of stained tissue. Every image has one label and nothing else is told. All carry clusters "
        "of round cells; in speckled images, half of the clusters are of cells with a fine checkerboard of the same mean "
        "colour, which a thumbnail averages away."
    )
    page.heading("Held-out images")
    page.table(
        ["trained and tested on", "AUC", "heatmap's maximum on a mark"],
        [
            (f"full resolution, {SIDE} pixels, streamed", full.auc, f"{hits} of {positives} speckled images"),
            (f"thumbnails, {THUMBNAIL} pixels", small.auc, ""),
        ],
    )
    page.paragraph(
        f"Both with {MODEL}, the maximum of its last map per channel as pooling, and the same settings and seed. A point "
        f"drawn blindly would lie on a mark, give or take one entry of the map ({STRIDE} pixels), in {chance:.1%} of cases."
    )
    page.heading("Memory of a training step")
    page.table(["batch of one image", ""], memory)
    page.heading("Where the evidence lies")
    page.paragraph(
        "Each picture shows the whole image with the evidence for the predicted class over it, and beside it, at full resolution, "
        "what lies where that is greatest. Evidence that a cluster is speckled lies on it; that an image is smooth can be seen "
        "nowhere, so its evidence is weak and lies everywhere."
    )
    shown = [index for index, image in enumerate(held_out) if image.label == CLASSES[1]][: _SHOWN - 2]
    shown += [index for index, image in enumerate(held_out) if image.label == CLASSES[0]][:2]
    for index in shown:
        image = held_out[index]
        seen = (
            f"{len(image.speckled)} of its {CLUSTERS} clusters are speckled"
            if image.speckled
            else "no cluster is speckled"
        )
        caption = f"{image.name}, labelled {image.label}: {seen}. Predicted: {full.predicted[index]}"
        page.picture(full.overlays[index].read_bytes(), caption, wide=True)
    page.paragraph(f"All of it took {seconds:.0f} s.")
    page.write(out / "report.html")
