"""`widefield.embed`: vectors of images, from a trained model."""

import csv
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from widefield.pretraining.arguments import Workers, auto_workers
from widefield.pretraining.checkpoint import Checkpoint
from widefield.pretraining.dataset import BadImage, Pictures, normalized
from widefield.pretraining.embedding import StreamingArgs
from widefield.pretraining.out import check_file
from widefield.pretraining.own_size import Look, embed_at_own_size
from widefield.pretraining.settings import Count, Errors, arguments
from widefield.pretraining.source import Files, ImageSource, make_source
from widefield.pretraining.transform_args import Normalize, Size
from widefield.registry import Range
from widefield.writing import replacing, write_torch_file

EmbeddingFormat = Literal["torch", "csv", "lightly_csv", "parquet"]


def check_format(format: EmbeddingFormat) -> None:
    """Raises ValueError if a package that `format` needs is not installed."""
    if format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError('format="parquet" needs the package pyarrow, which is not installed; pip install pyarrow')


def write_embeddings(path: Path, names: Sequence[str], embeddings: Tensor, format: EmbeddingFormat) -> None:
    """Write a row per image, whole or not at all.

    Args:
        path: The file.
        names: Of the images.
        embeddings: float32 (N, D).
        format: "torch": {"filenames": list, "embeddings": tensor}; "csv": columns filename, embedding_0, ...; "lightly_csv":
            columns filenames, embedding_0, ..., labels, as the tools of `lightly` read it, all labels 0; "parquet": columns
            filename and embedding, a list of fixed length.
    """
    if format == "torch":
        write_torch_file({"filenames": list(names), "embeddings": embeddings}, path)
        return
    with replacing(path) as partial:
        if format == "parquet":
            _write_parquet(partial, names, embeddings)
        else:
            _write_csv(partial, names, embeddings, with_labels=format == "lightly_csv")


def _write_csv(path: Path, names: Sequence[str], embeddings: Tensor, with_labels: bool) -> None:
    numbers = [f"embedding_{k}" for k in range(embeddings.shape[1])]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["filenames", *numbers, "labels"] if with_labels else ["filename", *numbers])
        for name, row in zip(names, embeddings.numpy(), strict=True):
            writer.writerow([name, *map(str, row), *(["0"] if with_labels else [])])


def _write_parquet(path: Path, names: Sequence[str], embeddings: Tensor) -> None:
    import pyarrow
    from pyarrow import parquet

    values: Any = pyarrow.array(embeddings.reshape(-1).numpy())
    vectors = pyarrow.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
    parquet.write_table(pyarrow.table({"filename": list(names), "embedding": vectors}), path)


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Arguments:
    out: Path
    data: Any
    checkpoint: Path
    format: EmbeddingFormat
    image_size: Size | None
    level: Annotated[int, Range(0)]
    streaming: StreamingArgs | None
    batch_size: Count
    num_workers: Workers
    accelerator: str
    overwrite: bool
    precision: str
    model: Any


def embed(
    out: str | Path,
    data: str | Path | Sequence[str | Path] | Dataset[Any],
    checkpoint: str | Path,
    *,
    format: EmbeddingFormat = "torch",
    image_size: int | tuple[int, int] | None = (224, 224),
    level: int = 0,
    streaming: Mapping[str, Any] | None = None,
    batch_size: int = 128,
    num_workers: int | Literal["auto"] = "auto",
    accelerator: str = "auto",
    overwrite: bool = False,
    precision: str = "32-true",
    model: Any = None,
) -> None:
    """Write the embedding of every image to a file, in the order of the images, whole or not at all.

    Values and channels of the images are treated as in the training. An image that cannot be read has no row, and is named in a
    warning.

    Args:
        out: The file.
        data: Images as `widefield.train` takes them; those of a folder are sorted, and named by their path in it.
        checkpoint: A .ckpt file in the folder `checkpoints` of a run.
        format: "torch": {"filenames": list, "embeddings": float32 (N, D)}; "csv": columns filename, embedding_0, ...;
            "lightly_csv": as the tools of `lightly` read it; "parquet" (needs pyarrow): columns filename and embedding.
        image_size: Pixels to which images are resized, a number or (height, width), whatever size and shape they have. None: they
            stay as they are, and go through the model one after the other.
        level: Level of a pyramid that is read with image_size=None, 0 the largest.
        streaming: Run the model tile by tile, as in `widefield.train`. With image_size=None a file is then never held whole, so
            that slides have one embedding each, in the memory of some tiles.
        batch_size: Images that go through the model together.
        num_workers: Processes that read images.
        accelerator, precision: Of Lightning.
        overwrite: Replace a file that is there.
        model: The model again, as `widefield.train` takes it; it is loaded with the weights. Needed if the run was not given
            it by name, because checkpoints hold no code.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: An argument cannot be used, or no image can be read; what is at `out` is as it was.
    """
    errors = Errors()
    given = arguments(_Arguments, locals(), errors)
    errors.raise_if_any("widefield.embed")
    workers = auto_workers(os.cpu_count(), 1) if given.num_workers == "auto" else given.num_workers
    if given.image_size is not None and given.level:
        raise ValueError(f"level={given.level} is for image_size=None, which takes images as they are")
    check_file(given.out, given.overwrite)
    check_format(given.format)
    found = Checkpoint.read(given.checkpoint)
    fabric = _fabric(given.accelerator, given.precision)
    vectors = _Vectors(found.embedding_model(given.model, given.streaming)).eval()
    model = fabric.setup_module(vectors)
    with torch.inference_mode():
        if given.image_size is None:
            source = make_source(given.data, found.num_channels, None, None)
            look = Look.of(found, next((p.dtype for p in vectors.parameters()), torch.float32))
            indices, embeddings = embed_at_own_size(
                model, source, look, given.level, given.streaming is not None, fabric.device
            )
        else:
            views = found.views(given.image_size)
            source = make_source(given.data, found.num_channels, views.reduction, None)
            loader = DataLoader(
                Pictures(source, views),
                given.batch_size,
                num_workers=min(workers, -(-len(source) // given.batch_size)),
                collate_fn=list,
                generator=torch.Generator(),  # else an epoch would draw from torch's default one
            )
            indices, embeddings = _embed(fabric.device, model, loader, found.normalize)
    names = _names(source, given.data)
    write_embeddings(given.out, [names[index] for index in indices], embeddings, given.format)
    _log.info("%d embeddings of %d numbers: %s", *embeddings.shape, given.out)


class _Vectors(nn.Module):
    """Embeddings (B, D) of images, as a forward pass."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.embedding(images)
        return out.flatten(1)


def _fabric(accelerator: str, precision: Any) -> Fabric:
    try:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise ValueError(f"accelerator={accelerator!r} and precision={precision!r} cannot be used: {error}") from error


def _embed(
    device: torch.device, model: nn.Module, loader: DataLoader[Any], normalize: Normalize
) -> tuple[list[int], Tensor]:
    """Numbers of the images that can be read, and their embeddings, float32 (N, D)."""
    indices: list[int] = []
    embeddings: list[Tensor] = []
    reason = ""
    for batch in loader:
        good = [picture for picture in batch if not isinstance(picture.pixels, BadImage)]
        for _, bad in batch:
            if isinstance(bad, BadImage):
                reason = bad.reason
                _log.warning("skipped an image: %s", reason)
        if good:
            images = normalized([picture.pixels for picture in good], normalize, device)
            embeddings.append(model(images).float().cpu())
            indices += [picture.number for picture in good]
    if not embeddings:
        raise ValueError(f"data: none of the images can be used; the last: {reason}")
    return indices, torch.cat(embeddings)


def _names(source: ImageSource, data: Any) -> list[str]:
    """Paths in the folder, if `data` is one, else as they were given."""
    if isinstance(source, Files) and isinstance(data, (str, Path)) and Path(data).is_dir():
        return [path.relative_to(data).as_posix() for path in source.paths]
    return [source.name(index) for index in range(len(source))]
