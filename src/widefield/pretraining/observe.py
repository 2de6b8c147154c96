"""Signs that a run works: the quality of embeddings while it trains, its views, a page at the end."""

import io
import json
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

from widefield.pretraining.dataset import BadImage, Index, Pictures, ViewDataset, normalized, seeded
from widefield.pretraining.labels import Labels
from widefield.pretraining.out import OutFolder
from widefield.pretraining.quality import effective_rank, knn_accuracy, nearest, spread
from widefield.pretraining.source import Files
from widefield.pretraining.views import to_unit, whole_image
from widefield.pretraining.wrapping import evaluating
from widefield.registry import Range
from widefield.writing import replacing

_log = logging.getLogger(__name__)
CELL, GAP = 112, 4
"""Longest side of a picture, and the space between two, in pixels."""


def sheet(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return one picture, uint8 (3, height, width), of rows of pictures (C, H, W), uint8 or floats from 0 to 1.

    Of a picture the first three channels are shown, or the first one as grey.
    """
    columns = max(map(len, rows))
    blank = torch.full((3, CELL, CELL), 255, dtype=torch.uint8)
    cells = [cell for row in rows for cell in (*map(_cell, row), *[blank] * (columns - len(row)))]
    return make_grid(cells, columns, GAP, pad_value=255)


def _cell(picture: Tensor) -> Tensor:
    """uint8 (3, CELL, CELL), white where the picture is shorter than the cell."""
    shown = to_unit(picture[:3] if len(picture) >= 3 else picture[:1], None).expand(3, -1, -1)
    scale = CELL / max(shown.shape[1:])
    height, width = (max(1, round(side * scale)) for side in shown.shape[1:])
    resized = (F.resize(shown, [height, width], antialias=True).clamp(0, 1) * 255).round().to(torch.uint8)
    return F.pad(resized, [0, 0, CELL - width, CELL - height], fill=255)


def _as_png(picture: Tensor) -> bytes:
    buffer = io.BytesIO()
    F.to_pil_image(picture).save(buffer, "PNG")
    return buffer.getvalue()


LONGEST, BATCH = 256, 32
"""Longest side of the pictures in pixels, and how many go through the model together."""
SHARE = 10
"""Images that are trained on for each one that is embedded, which costs about a fiftieth of the time."""
COLLAPSED_SPREAD, COLLAPSED_RANK = 0.02, 1.5
"""Below one of these, embeddings say next to nothing of their images."""


@dataclass(frozen=True)
class QualityArgs:
    """Embeds some images now and then: k-nearest-neighbour accuracy if there are labels, effective rank, spread.

    Attributes:
        labels: CSV file with the columns image and label. None: folders of classes, or `targets` of a dataset.
        images: How many are embedded.
    """

    labels: Path | None = None
    images: Annotated[int, Range(4)] = 512


@dataclass(frozen=True)
class ReportArgs:
    """Draws views at the start, into TensorBoard too, and writes a page at the end."""


@dataclass(frozen=True)
class Sample:
    """Images that are embedded: uint8, or floats from 0 to 1; and their labels, if there are any."""

    pictures: list[Tensor]
    labels: list[str] | None


def draw_sample(dataset: ViewDataset, labels: Labels | None, count: int) -> Sample:
    """At most `count` images that can be read, those with a label if there are labels; no random number of the run is drawn."""
    args = dataset.views.args
    height, width = dataset.views.sizes[0]
    scale = min(1.0, LONGEST / max(height, width))
    views = whole_image(args, (max(1, round(height * scale)), max(1, round(width * scale))))
    source = dataset.source
    if isinstance(source, Files):
        source = Files(source.paths, source.num_channels, views.reduction)
    known = range(len(source)) if labels is None else [k for k, label in enumerate(labels) if label is not None]
    chosen = sorted(Random(dataset.seed).sample(known, min(count, len(known))))
    pictures, numbers = [], []
    for number in chosen:
        pixels = Pictures(source, views)[number].pixels
        if not isinstance(pixels, BadImage):
            pictures.append(pixels)
            numbers.append(number)
    found = None if labels is None else [str(labels[number]) for number in numbers]
    return Sample(pictures, found if found is not None and len(set(found)) > 1 else None)


class Quality(Callback):
    """Logs `effective_rank`, `embedding_spread` and with labels `knn_accuracy`: before the first step, at the end, and between.

    Weights, statistics and random numbers of the run stay as they are. What goes wrong here never ends a run.
    """

    def __init__(self, args: QualityArgs, labels: Labels | None) -> None:
        self._args, self._labels = args, labels
        self.sample: Sample | None = None
        self._warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        sample = draw_sample(pl_module.dataset, self._labels, self._args.images)
        if len(sample.pictures) < 2:
            return
        self.sample = sample
        if trainer.global_step == 0:
            self._measure(trainer, pl_module, step=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.sample is None:
            return
        epoch = trainer.current_epoch + 1
        every = math.ceil(SHARE * len(self.sample.pictures) / len(pl_module.dataset))
        if epoch % every and epoch != trainer.max_epochs and not trainer.should_stop:
            return
        numbers = self._measure(trainer, pl_module, step=trainer.global_step - 1)
        collapsed = (
            numbers
            and min(numbers["embedding_spread"] / COLLAPSED_SPREAD, numbers["effective_rank"] / COLLAPSED_RANK) < 1
        )
        if collapsed and not self._warned:
            _log.warning(
                "the embeddings have collapsed: those of %d images have an effective rank of %.2f and a spread of %.4f, so "
                "they say next to nothing of the images; try a smaller optim_args={'lr': ...}, a larger batch_size, or "
                "another method",
                len(self.sample.pictures),
                numbers["effective_rank"],
                numbers["embedding_spread"],
            )
        self._warned = bool(collapsed)

    def embeddings(self, trainer: Trainer, pl_module: Any) -> Tensor | None:
        """float32 (N, D) of the sample, by the model that is exported; None if there is no sample, or it cannot be embedded."""
        if self.sample is None:
            return None
        embedding = pl_module.method.exported()
        device = pl_module.device
        cuda = [device] if device.type == "cuda" else []
        pictures = self.sample.pictures
        found = []
        try:
            with (
                evaluating(embedding),
                torch.no_grad(),
                torch.random.fork_rng(cuda),
                seeded(0, 0),
                trainer.precision_plugin.forward_context(),
            ):
                for start in range(0, len(pictures), BATCH):
                    images = normalized(
                        pictures[start : start + BATCH], pl_module.settings.transforms.normalize, device
                    )
                    vectors = embedding.vectors(trainer.precision_plugin.convert_input(images))
                    found.append(vectors.float().cpu())
        except Exception as error:
            shape = " x ".join(map(str, pictures[0].shape))
            _log.warning("quality is not measured, because the model cannot embed pictures of %s: %s", shape, error)
            self.sample = None
            return None
        return torch.cat(found)

    def _measure(self, trainer: Trainer, pl_module: LightningModule, step: int) -> dict[str, float]:
        """Log the quality at `step` and return it; nothing, where embeddings are none or no numbers."""
        embeddings = self.embeddings(trainer, pl_module)
        if self.sample is None or embeddings is None or not bool(embeddings.isfinite().all()):
            return {}
        numbers = {"effective_rank": effective_rank(embeddings), "embedding_spread": spread(embeddings)}
        if self.sample.labels is not None:
            numbers["knn_accuracy"] = knn_accuracy(embeddings, self.sample.labels)
        for logger in trainer.loggers:  # not by the module's `log`, which waits for all processes
            logger.log_metrics({"epoch": trainer.current_epoch, **numbers}, step)
        return numbers


class Report(Callback):
    """Draws the views of some images before the first step, and writes a page when the run ends."""

    ROWS, NEIGHBOURS = 8, 6

    def __init__(self, out: OutFolder, quality: Quality | None) -> None:
        self._out, self._quality = out, quality

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not self._out.views.exists():
            dataset: ViewDataset = replace(pl_module.dataset, deferred=False)
            count = min(self.ROWS, len(dataset))
            rows = [dataset[Index(0, k * len(dataset) // count)].views for k in range(count)]
            picture = sheet(rows)
            with replacing(self._out.views) as partial:
                partial.write_bytes(_as_png(picture))
            for logger in trainer.loggers:
                writer: Any = getattr(logger, "experiment", None)
                if hasattr(writer, "add_image"):  # TensorBoard's
                    writer.add_image("augmented_views", picture, 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        sample = embeddings = None
        if self._quality is not None:
            embeddings, sample = self._quality.embeddings(trainer, pl_module), self._quality.sample
        try:
            from widefield.reports.pretraining import write_pretraining_page  # loads matplotlib

            write_pretraining_page(
                self._out.report,
                facts=[
                    ("method", pl_module.settings.given.method),
                    ("images", len(pl_module.dataset)),
                    ("epochs", trainer.current_epoch),
                    ("steps", trainer.global_step),
                ],
                metrics=_series(self._out.metrics),
                views=self._out.views.read_bytes(),
                neighbours=None
                if sample is None or embeddings is None
                else self._neighbours(sample.pictures, embeddings),
                embeddings=None if embeddings is None else embeddings.numpy(),
                labels=None if sample is None else sample.labels,
            )
        except Exception as error:  # of whatever draws; the run itself is done
            _log.warning("the report could not be written: %s: %s", type(error).__name__, error)

    def _neighbours(self, pictures: Sequence[Tensor], embeddings: Tensor) -> bytes:
        others = nearest(embeddings, min(self.NEIGHBOURS, len(pictures) - 1))[1].tolist()
        queries = [k * len(pictures) // self.ROWS for k in range(min(self.ROWS, len(pictures)))]
        return _as_png(sheet([[pictures[query], *(pictures[other] for other in others[query])] for query in queries]))


def _series(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every metric of the run; nothing if there is no such file."""
    series = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        numbers = json.loads(line)
        for name, value in numbers.items():
            if name != "step":
                series[name].append((numbers["step"], float(value)))
    return dict(series)
