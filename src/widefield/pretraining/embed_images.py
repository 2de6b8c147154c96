"""`widefield.embed`: vectors of images, from a trained model."""

import csv
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.accelerators import CPUAccelerator
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from widefield.images import Background, ForegroundChoice, ImageReadError
from widefield.pretraining.arguments import Workers, auto_workers, check_precision
from widefield.pretraining.checkpoint import Checkpoint
from widefield.pretraining.dataset import BadImage, Pictures, normalized
from widefield.pretraining.embedding import StreamingArgs
from widefield.pretraining.out import check_file
from widefield.pretraining.pixels import open_lazily, read_pixels, with_channels
from widefield.pretraining.settings import Count, Errors, arguments
from widefield.pretraining.slides import PatchArgs
from widefield.pretraining.source import Files, ImageSource, Patches, make_source, reading
from widefield.pretraining.transform_args import Normalize, Size, TransformArgs
from widefield.pretraining.views import to_unit, whole_image
from widefield.registry import Range
from widefield.streaming import StreamingCNN
from widefield.writing import replacing, write_torch_file

if TYPE_CHECKING:
    from widefield.reports import ProgressLine

_log = logging.getLogger(__name__)
Format = Literal["torch", "csv", "lightly_csv", "parquet"]


class EmbeddingFormat(StrEnum):
    """Formats of `embed`."""

    TORCH = "torch"
    CSV = "csv"
    LIGHTLY_CSV = "lightly_csv"
    PARQUET = "parquet"


def write_embeddings(path: Path, names: Sequence[str], embeddings: Tensor, format: Format) -> None:
    """Write a row per image, whole or not at all; for the formats see `embed`."""
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


def embed(
    out: Path | str,
    data: str | Path | Sequence[str | Path] | Dataset[Any],
    checkpoint: Path | str,
    *,
    format: Format | EmbeddingFormat = "torch",
    image_size: Size | None = (224, 224),
    level: Annotated[int, Range(0)] = 0,
    spacing: Annotated[float, Range(0)] | None = None,
    slides: PatchArgs | Mapping[str, Any] | None = None,
    foreground: str | Path = "auto",
    pool: bool = True,
    streaming: StreamingArgs | Mapping[str, Any] | None = None,
    batch_size: Count = 128,
    num_workers: Workers = "auto",
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
            "lightly_csv": columns filenames, embedding_0, ..., labels, as the tools of `lightly` read it, all labels 0; "parquet"
            (needs pyarrow): columns filename and embedding, a list of fixed length.
        image_size: Pixels to which images are resized, a number or (height, width), whatever size and shape they have. None: they
            stay as they are, and go through the model one after the other.
        level: Level of a pyramid that is read with image_size=None, 0 the largest.
        spacing: Micrometres per pixel that are read with image_size=None instead of a level, see `open_image`.
        slides: Take `data` for slides, each patch of which has an embedding: patch_size, level or spacing, foreground. Patches tile
            the slide where there is tissue, and are named by the slide, a colon, and y and x of their corner: "a.svs:512,1024".
        foreground: What of a slide as a whole is computed, see `ForegroundChoice.method`: with image_size=None and `streaming`. The
            embedding is that of the foreground; where images have no row by a method that finds none, a warning says so.
        pool: False writes the maps before pooling, one embedding for each position, as "embeddings" (N, D, h, w), for a format of
            "torch" and images of one size. Of a vision transformer these are its patches.
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
    from widefield.reports import ProgressLine  # loads matplotlib

    errors = Errors()
    given = arguments(embed, locals(), errors, unchecked=("data",))
    errors.raise_if_any("widefield.embed")
    workers = auto_workers(os.cpu_count(), 1) if given.num_workers == "auto" else given.num_workers
    if given.spacing == 0:
        raise ValueError("spacing=0 must be above 0")
    if given.image_size is not None and (given.level or given.spacing):
        told = f"level={given.level}" if given.level else f"spacing={given.spacing:g}"
        raise ValueError(f"{told} is for image_size=None, which takes images as they are")
    if given.slides is not None and (given.level or given.spacing):
        raise ValueError("slides has level and spacing of its own; give them there, as in slides={'spacing': 0.5}")
    choice = ForegroundChoice(str(given.foreground))
    _check_foreground(choice, given)
    if not given.pool and given.format != "torch":
        raise ValueError(f'pool=False gives maps, and format={given.format!r} is for vectors; give format="torch"')
    check_file(given.out, given.overwrite)
    if given.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError('format="parquet" needs the package pyarrow, which is not installed; pip install pyarrow')
    found = Checkpoint.read(given.checkpoint)
    fabric = _fabric(given.accelerator, given.precision)
    embedding = found.embedding_model(given.model, given.streaming).eval()
    model, args = partial(fabric.setup_module(embedding), pool=given.pool), found.transforms
    patches = None if given.slides is None else Patches.of(given.data, args.channels, given.slides)
    source: ImageSource
    with torch.inference_mode():
        if given.image_size is None:
            source = patches or make_source(given.data, args.channels, None, None)
            look = Look(
                args, next((p.dtype for p in embedding.parameters()), torch.float32), given.level, given.spacing
            )
            if isinstance(source, Files):
                choice.check_count(len(source))
            masks = choice if given.pool and given.streaming is not None else ForegroundChoice("none")
            embedded = _at_own_size(model, source, look, given.streaming is not None, fabric.device, masks)
        else:
            views = whole_image(args, given.image_size)
            source = patches or make_source(given.data, args.channels, views.reduction, None)
            loader = DataLoader(
                Pictures(source, views),
                given.batch_size,
                num_workers=min(workers, -(-len(source) // given.batch_size)),
                collate_fn=list,
                generator=torch.Generator(),  # else an epoch would draw from torch's default one
            )
            embedded = _in_batches(model, loader, args.normalize, fabric.device)
        streamed = next((part for part in embedding.modules() if isinstance(part, StreamingCNN)), None)
        with ProgressLine(streamed) as line:
            indices, embeddings = _collected(_counted(embedded, len(source), line), maps=not given.pool)
    names = _names(source, given.data)
    write_embeddings(given.out, [names[index] for index in indices], embeddings, given.format)
    shape = " x ".join(map(str, embeddings.shape[1:]))
    _log.info("%d embeddings of %s numbers: %s", len(embeddings), shape, given.out)


def _check_foreground(choice: ForegroundChoice, given: Any) -> None:
    """Raise ValueError if masks were asked for by name where there are none."""
    if choice.is_explicit and (given.image_size is not None or given.streaming is None or not given.pool):
        patches = "; patches of slides are chosen by slides={'foreground': True}" if given.slides is not None else ""
        raise ValueError(
            f"foreground={choice.method!r} is for slides as a whole, with image_size=None, streaming and pool=True{patches}"
        )


def _fabric(accelerator: str, precision: Any) -> Fabric:
    try:
        fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise ValueError(f"accelerator={accelerator!r} and precision={precision!r} cannot be used: {error}") from error
    check_precision(precision, isinstance(fabric.accelerator, CPUAccelerator))
    return fabric


Embedded = tuple[list[int], Tensor] | str
"""Numbers of images and their embeddings (N, D, h, w), or why an image has none."""


def _in_batches(
    model: Callable[[Any], Tensor], loader: DataLoader[Any], normalize: Normalize, device: torch.device
) -> Iterator[Embedded]:
    for batch in loader:
        yield from (picture.pixels.reason for picture in batch if isinstance(picture.pixels, BadImage))
        good = [picture for picture in batch if not isinstance(picture.pixels, BadImage)]
        if good:
            images = normalized([picture.pixels for picture in good], normalize, device)
            yield [picture.number for picture in good], model(images)


def _at_own_size(
    model: Callable[[Any], Tensor],
    source: ImageSource,
    look: "Look",
    streams: bool,
    device: torch.device,
    foreground: ForegroundChoice,
) -> Iterator[Embedded]:
    """One image after the other; whole slides too, which are read tile by tile if the model `streams`."""
    for index in range(len(source)):
        try:
            image = _open(source, index, look)
            if isinstance(image, LazyPixels) and not streams:
                image = image.read(0, 0, *image.shape[1:])
            if isinstance(image, LazyPixels):
                image.leave_out_background(foreground)
            found, has_refused = _embedded(model, image[None].to(device) if isinstance(image, Tensor) else image)
            foreground = ForegroundChoice("none") if has_refused else foreground
            yield [index], found
        except (OSError, ValueError, RuntimeError) as error:  # an image may be too small for the model, or too large
            yield str(error) if isinstance(error, OSError) else f"{source.name(index)}: {error}"


def _embedded(model: Callable[[Any], Tensor], image: "Tensor | LazyPixels") -> tuple[Tensor, bool]:
    """Return the embedding of an image, and True if the model refuses masks that were not asked for by name, and did without."""
    try:
        return model(image), False
    except ValueError as error:
        if isinstance(image, Tensor) or image.background is None or image.background.required:
            raise
        image.background = None
        found = model(image)
        _log.info("background is not left out: %s", error)
        return found, True


def _counted(embedded: Iterable[Embedded], total: int, line: "ProgressLine") -> Iterator[Embedded]:
    """Yield the same, and tell the line how many images are done."""
    done = 0
    line.update(done, total)
    for one in embedded:
        done += 1 if isinstance(one, str) else len(one[0])
        line.update(done, total)
        yield one


def _collected(embedded: Iterable[Embedded], maps: bool) -> tuple[list[int], Tensor]:
    """Numbers of the images that can be used, and their embeddings, float32 (N, D), or (N, D, h, w) as `maps`."""
    indices: list[int] = []
    embeddings: list[Tensor] = []
    reason = ""
    for one in embedded:
        if isinstance(one, str):
            reason = one
            _log.warning("skipped an image: %s", reason)
        else:
            indices += one[0]
            embedded_here = one[1] if maps else one[1].flatten(1)
            if embeddings and embedded_here.shape[1:] != embeddings[0].shape[1:]:
                shapes = [" x ".join(map(str, each.shape[1:])) for each in (embeddings[0], embedded_here)]
                raise ValueError(f"images have maps of {shapes[0]} and {shapes[1]}; give an image_size, or pool=True")
            embeddings.append(embedded_here.float().cpu())
    if not embeddings:
        raise ValueError(f"data: none of the images can be used; the last: {reason}")
    return indices, torch.cat(embeddings)


@dataclass(frozen=True)
class Look:
    """The pixels that a model takes: at a level or spacing, with the channels, values and normalisation of `args`, of a type."""

    args: TransformArgs
    dtype: torch.dtype
    level: int = 0
    spacing: float | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (C, height, width), normalised."""
        unit = to_unit(pixels, self.args.value_range)
        return normalized([unit], self.args.normalize, unit.device)[0].to(self.dtype)


class LazyPixels:
    """An image file as a model sees it, of which only the regions that are asked for are read.

    No dataclass: Lightning takes those apart.
    """

    def __init__(self, image: Any, look: Look, name: str) -> None:
        self._image, self._look, self._name = image, look, name
        self.background: Background | None = None

    def leave_out_background(self, choice: ForegroundChoice) -> None:
        """Find the `background` by `choice`, which also raises what is wrong, and log how much of the image it is."""
        found = choice.of(self._image)
        if found is None:
            return
        pixel = np.array(found.fill, self._image.dtype)[:, None, None]
        fill = self._look(with_channels(torch.from_numpy(pixel), self._look.args.channels, self._name))
        self.background = replace(found, fill=tuple(fill.flatten().tolist()))
        _log.info("%s: %.0f%% of its pixels are background, which is skipped", self._name, 100 * (1 - found.mask.share))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) as the model sees them."""
        return self._look.args.channels, *self._image.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """That of the model."""
        return self._look.dtype

    def read(self, y: int, x: int, height: int, width: int) -> Tensor:
        """A region (channels, height, width), normalised.

        Raises:
            ImageReadError: It cannot be read, or has channels that the model does not take.
        """
        pixels = torch.from_numpy(self._image.read(y, x, height, width))
        return self._look(with_channels(pixels, self._look.args.channels, self._name))


def _open(source: ImageSource, index: int, look: Look) -> LazyPixels | Tensor:
    """An image of a file, read lazily if its format allows it, else as a tensor (C, height, width)."""
    if not isinstance(source, Files):
        return look(source.read(index, Random(index)))
    path = source.paths[index]
    with reading(path):
        level = None if look.spacing else look.level
        try:
            return LazyPixels(open_lazily(path, look.args.channels, level, look.spacing), look, str(path))
        except ImageReadError:
            if look.level or look.spacing:
                raise
            return look(read_pixels(path, look.args.channels))


def _names(source: ImageSource, data: Any) -> list[str]:
    """Paths in the folder, if `data` is one, else as they were given."""
    if isinstance(source, Files) and isinstance(data, (str, Path)) and Path(data).is_dir():
        return [path.relative_to(data).as_posix() for path in source.paths]
    return [source.name(index) for index in range(len(source))]
