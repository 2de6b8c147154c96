"""The image files that `data` names: folders searched in sorted order, files as they are."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Files of a folder that count as images; upper case does too."""

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
            images = [one for one in sorted_images(path) if but is None or one.name != but.name or one.resolve() != but]
            if not images and not one:
                _log.warning("the folder %s holds no images", path)
            found += images
        elif not path.exists():
            wrong.append(f"data: {path} does not exist")
        elif path.suffix.lower() not in EXTENSIONS:
            wrong.append(f"data: {path} has no extension of an image, which are {', '.join(EXTENSIONS)}")
        else:
            found.append(path)
    if not found and not wrong:
        where = ", ".join(map(str, given[:3])) or "the empty list"
        wrong.append(f"data: there are no images in {where}; images end in {', '.join(EXTENSIONS)}")
    if wrong:
        more = [f"... and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise ValueError("\n".join([*wrong[:10], *more]))
    return found


def sorted_images(folder: Path) -> list[Path]:
    """The images in `folder` and below, in the order of their paths."""
    return sorted(_walk(folder), key=lambda path: path.relative_to(folder).as_posix())


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not _leads_back(Path(parent), name)]
        yield from _images(parent, names)


def _images(parent: str, names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        if not name.startswith(".") and name.lower().endswith(EXTENSIONS):
            yield Path(parent, name)


def _leads_back(parent: Path, name: str) -> bool:
    """Whether the link leads to a folder above, so that following it would never end."""
    path = parent / name
    return path.is_symlink() and parent.resolve().is_relative_to(path.resolve())
