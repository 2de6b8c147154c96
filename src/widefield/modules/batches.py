"""A batch as Lightning hands it on: which parts of it are images, and which of those are read lazily."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from widefield.streaming import LazyImage

_IMAGES = ("image", "images", "inputs")


def parts_moved(batch: Any, keep: Callable[[Any], Any], move: Callable[[Any], Any]) -> Any:
    """`batch` with its images through `keep`, and all else, but for other lazy images, through `move`.

    Images are the first of several parts of a batch, the entries `image`, `images` or `inputs` of a dict, or the batch itself.
    """
    if isinstance(batch, dict):
        return type(batch)({key: (keep if key in _IMAGES else move)(part) for key, part in batch.items()})
    if isinstance(batch, (list, tuple)) and batch and not all(map(is_lazy, batch)):
        images = type(batch[0])(map(keep, batch[0])) if isinstance(batch[0], (list, tuple)) else keep(batch[0])
        made = [images, *(part if is_lazy(part) else move(part) for part in batch[1:])]
        return type(batch)(*made) if hasattr(batch, "_fields") else type(batch)(made)
    return keep(batch)


def is_lazy(part: Any) -> bool:
    """True if it is an image that is read region by region."""
    return not isinstance(part, Tensor) and isinstance(part, LazyImage)


def _is_image(part: Any) -> bool:
    return is_lazy(part) or (isinstance(part, Tensor) and part.ndim == 4)


def has_more(batch: Any) -> bool:
    """True if a batch is images and something else: labels, names."""
    return isinstance(batch, (list, tuple)) and len(batch) > 1 and not all(map(_is_image, batch))


def described(batch: Any) -> str:
    """For an error message."""
    if isinstance(batch, dict):
        return f"a dict of {', '.join(map(str, batch))}"
    return f"a {type(batch).__name__}"
