"""Sources of images: files, slides or a dataset of the user's, all by number."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from widefield.errors import WidefieldError
from widefield.images import OTHER_PICTURES, ImageReadError, image_endings, images_below, is_image_name
from widefield.pretraining.pixels import Reduction, as_tensor, open_lazily, read_pixels, with_channels
from widefield.pretraining.slides import PatchArgs, Region, SlideArgs, grid, read_patch, read_region

_log = logging.getLogger(__name__)


def find_images(data: str | Path | Sequence[str | Path], but: Path | None = None) -> list[Path]:
    """All image files but one, those of a folder sorted by their path in it.

    Folders are searched with all below; links are followed.

    Raises:
        ValueError: A path does not exist, a file has no extension of an image, or there is no image at all; a line each.
    """
    one = isinstance(data, (str, Path))
    given = [Path(data)] if isinstance(data, (str, Path)) else [Path(entry) for entry in data]
    found: list[Path] = []
    wrong: list[str] = []
    for path in given:
        if path.is_dir():
            seen = images_below(path, [*image_endings(), *OTHER_PICTURES])
            images = [one for one in seen if is_image_name(one.name)]
            if len(images) < len(seen):
                left_out = Counter(one.suffix.lower() for one in seen if not is_image_name(one.name))
                told = ", ".join(f"{count} {ending}" for ending, count in sorted(left_out.items()))
                _log.warning("pictures in %s that are not read are left out: %s; convert them to PNG", path, told)
            images = [one for one in images if but is None or one.name != but.name or one.resolve() != but]
            if not images and not one:
                _log.warning("the folder %s holds no images", path)
            found += images
        elif not path.exists():
            wrong.append(f"data: {path} does not exist; name a folder of images, or image files")
        elif not is_image_name(path.name):
            wrong.append(f"data: {path} has no extension of an image, which are {', '.join(image_endings())}")
        else:
            found.append(path)
    if not found and not wrong:
        where = ", ".join(map(str, given[:3])) or "the empty list"
        wrong.append(f"data: there are no images in {where}; images end in {', '.join(image_endings())}")
    if wrong:
        more = [f"... and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise ValueError("\n".join([*wrong[:10], *more]))
    return found


class ImageSource(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return the name of the image in messages: its path, if it has one."""

    def read(self, index: int, random: Random) -> Tensor:
        """The image (C, H, W); what is drawn of a slide depends on `random`. OSError if it cannot be read."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong in this block is an `ImageReadError`: of a damaged file, readers raise nearly anything."""
    tifffile = logging.getLogger("tifffile")
    level = tifffile.level
    tifffile.setLevel(logging.CRITICAL)  # it logs what it then raises
    try:
        yield
    except (OSError, MemoryError):
        raise
    except WidefieldError as error:
        raise ImageReadError(f"cannot use {path}: {error}") from error
    except Exception as error:
        raise ImageReadError(f"cannot read {path}: {type(error).__name__}: {error}") from error
    finally:
        tifffile.setLevel(level)


@dataclass(frozen=True)
class Files:
    """Whole image files; photos may be decoded `reduction` times smaller, see `read_pixels`."""

    paths: Sequence[Path]
    num_channels: int
    reduction: Reduction | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, index: int, random: Random) -> Tensor:
        with reading(self.paths[index]):
            return read_pixels(self.paths[index], self.num_channels, self.reduction)


@dataclass(frozen=True)
class Slides:
    """Patches of slides: `args.patches_per_slide` numbers stand for each."""

    paths: Sequence[Path]
    num_channels: int
    args: SlideArgs

    def __len__(self) -> int:
        return len(self.paths) * self.args.patches_per_slide

    def name(self, index: int) -> str:
        return str(self.paths[index // self.args.patches_per_slide])

    def read(self, index: int, random: Random) -> Tensor:
        path = self.paths[index // self.args.patches_per_slide]
        with reading(path):
            return read_patch(path, self.args, self.num_channels, random)


@dataclass(frozen=True)
class Patches:
    """Patches of slides at given places, each named by the slide's name, a colon, and y and x of its corner."""

    places: Sequence[tuple[Path, str, Region]]
    num_channels: int
    args: PatchArgs

    @classmethod
    def of(cls, data: Any, num_channels: int, args: PatchArgs) -> "Patches":
        """All patches with foreground of the slides in `data`; one that cannot be read has none, and is named in a warning.

        Raises:
            ValueError: There are none.
        """
        places: list[tuple[Path, str, Region]] = []
        for path in find_images(data):
            name = (
                path.relative_to(data).as_posix() if isinstance(data, (str, Path)) and path != Path(data) else str(path)
            )
            try:
                with reading(path):
                    places += ((path, name, region) for region in grid(path, args, num_channels))
            except ImageReadError as error:
                _log.warning("skipped a slide: %s", error)
        if not places:
            raise ValueError("data: none of the slides can be used")
        return cls(places, num_channels, args)

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        _, name, region = self.places[index]
        return f"{name}:{region.y},{region.x}"

    def read(self, index: int, random: Random) -> Tensor:
        path, _, region = self.places[index]
        with reading(path):
            image = open_lazily(path, self.num_channels, self.args.level, self.args.spacing)
            return read_region(image, region, self.num_channels)


@dataclass(frozen=True)
class Items:
    """A torch dataset of images, of (image, ...) or of {"image": image, ...}."""

    dataset: Any
    num_channels: int

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"item {index} of {type(self.dataset).__name__}"

    def read(self, index: int, random: Random) -> Tensor:
        item = self.dataset[index]
        if isinstance(item, Mapping):
            if "image" not in item:
                raise TypeError(f'{self.name(index)} has {", ".join(map(repr, item))} and needs an entry "image"')
            item = item["image"]
        elif isinstance(item, tuple | list):
            item = item[0]
        return with_channels(as_tensor(item), self.num_channels, self.name(index), isinstance(item, Image.Image))


def make_source(
    data: Any, num_channels: int, reduction: Reduction | None, slides: SlideArgs | None, but: Path | None = None
) -> ImageSource:
    """The images that `data` names: a folder, a file, a list of these, or a dataset with a length.

    Args:
        data: As `widefield.train` takes it.
        num_channels: Of the images.
        reduction: How much smaller files may be decoded.
        slides: How patches of slides are drawn; None takes files whole.
        but: A file that is no image of these, wherever it lies.

    Raises:
        ValueError: It names none.
    """
    if isinstance(data, (str, Path)) or (
        isinstance(data, Sequence) and all(isinstance(one, (str, Path)) for one in data)
    ):
        paths = tuple(find_images(data, but))
        return Files(paths, num_channels, reduction) if slides is None else Slides(paths, num_channels, slides)
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or isinstance(data, Mapping):
        raise ValueError(
            f"data must be a folder, a file, a list of these or a torch dataset with a length: got {type(data).__name__}"
        )
    if slides is not None:
        raise ValueError("slides are files; give data as a folder or a list of them")
    if not len(data):
        raise ValueError(f"data: the {type(data).__name__} is empty")
    return Items(data, num_channels)
