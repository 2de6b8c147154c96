"""The image files that `data` names: folders searched in sorted order, files as they are."""

import logging
from collections.abc import Sequence
from pathlib import Path

from widefield.images import IMAGE_ENDINGS, images_below, is_image_name

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
            images = [one for one in images_below(path) if but is None or one.name != but.name or one.resolve() != but]
            if not images and not one:
                _log.warning("the folder %s holds no images", path)
            found += images
        elif not path.exists():
            wrong.append(f"data: {path} does not exist")
        elif not is_image_name(path.name):
            wrong.append(f"data: {path} has no extension of an image, which are {', '.join(IMAGE_ENDINGS)}")
        else:
            found.append(path)
    if not found and not wrong:
        where = ", ".join(map(str, given[:3])) or "the empty list"
        wrong.append(f"data: there are no images in {where}; images end in {', '.join(IMAGE_ENDINGS)}")
    if wrong:
        more = [f"... and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise ValueError("\n".join([*wrong[:10], *more]))
    return found
