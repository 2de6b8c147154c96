"""Image formats: how one is registered, what its reader tells of a file, and the error of all readers.

A format is a function that opens a file, under one decorator:

    @image_format("PNM", endings=(".pgm", ".ppm"), recognises=lambda path, start: start[:2] in (b"P5", b"P6"))
    def open_pnm(path, choice):
        ...
        return Contents(levels=((height, width),), pixels=lambda level: ArrayPixels(array))

Other packages name the module that holds such functions as an entry point of the group `widefield.image_formats`.
"""

import difflib
import importlib
import logging
import math
import numbers
import operator
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import entry_points
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any, Literal, Protocol
from weakref import WeakSet

import numpy as np

from widefield.errors import WidefieldError, WrongArgumentError

_log = logging.getLogger(__name__)

Alpha = Literal["drop", "keep"]
"""Treatment of a last channel that the file marks as alpha."""

Palette = Literal["colours", "indices"]
"""A pixel of a picture with a palette: its colour as RGB, or its stored index."""

ChannelAxis = Literal["first", "last"]
"""Axis of the channels of an array of three axes."""

Spacing = tuple[float, float]
"""Micrometres per pixel, (y, x)."""

Size = tuple[int, int]
"""(height, width) in pixels."""

Transform = tuple[float, float, float, float, float, float]
"""(a, b, c, d, e, f): pixel corner (x, y) lies at (a x + b y + c, d x + e y + f) in the units of the CRS, as in rasterio."""


class ImageReadError(WidefieldError, OSError):
    """A file cannot be read as an image: unsupported, truncated or corrupt.

    The message names the file and the reason. It is raised when the file is opened, or when the damaged part is read.
    """


def cannot_read(path: object, reason: str) -> ImageReadError:
    """The error for the file at `path`; `reason` says what is wrong and, where something helps, what to do."""
    return ImageReadError(f"cannot read {path}: {reason}")


class Pixels(Protocol):
    """The pixels of one level of one image. Any number of threads may read at the same time, before and after a fork."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""

    @property
    def dtype(self) -> np.dtype:
        """Type of the pixels, in native byte order."""

    def read(self, y: int, x: int, height: int, width: int, channels: Sequence[int]) -> np.ndarray:
        """Writable array (len(channels), height, width) of a region that lies inside the image (not checked here)."""


@dataclass(frozen=True)
class Choice:
    """Arguments of `open_image` that a reader must know to open the file."""

    series: int | str | None = None
    channel_axis: ChannelAxis | None = None
    palette: Palette = "colours"


@dataclass(frozen=True)
class Contents:
    """One image in a file, as its reader tells it; nothing of it has been decoded yet."""

    levels: tuple[Size, ...]
    """(height, width) of every level, largest first."""
    pixels: Callable[[int], Pixels]
    """Opens the pixels of a level."""
    spacing: Spacing | None = None
    """Micrometres per pixel of level 0; None if the file doesn't say."""
    channel_names: tuple[str, ...] | None = None
    has_alpha: bool = False
    """True if the last channel is the transparency of a picture."""
    nodata: float | None = None
    """Value of pixels that hold no data."""
    crs: str | None = None
    """Coordinate reference system, such as "EPSG:32632"."""
    transform: Transform | None = None
    """Place of level 0 on the map; None if it is no map."""
    associated: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    """Readers of the pictures beside the image (label, macro, thumbnail), as uint8 arrays (height, width, 3), by name."""


Opener = Callable[[Any, Choice], Contents]
"""Called with the path, of which only the reader of Zarr gets URLs as strings."""


@dataclass(frozen=True)
class ImageFormat:
    """A registered format; see `image_format`."""

    name: str
    endings: tuple[str, ...]
    recognises: Callable[[Any, bytes], bool]
    open: Opener
    before: tuple[str, ...]
    takes_channel_axis: bool


_FORMATS: list[ImageFormat] = []


def image_format(
    name: str,
    *,
    endings: Sequence[str],
    recognises: Callable[[Any, bytes], bool],
    before: Sequence[str] = (),
    takes_channel_axis: bool = False,
) -> Callable[[Opener], Opener]:
    """Return a decorator that registers a function as the reader of a format.

    Args:
        name: For messages, such as "OME-Zarr".
        endings: How the names of its files end, in lower case, such as ".zarr".
        recognises: Called with the path and its first 256 bytes (none of a folder or a URL); True if the reader is to open it.
            Formats of other packages are asked first.
        before: Names of formats that are asked later, because they would recognise some of these files, too.
        takes_channel_axis: True if a file may leave open which axis the channels are, as arrays do.
    """

    def register(opener: Opener) -> Opener:
        _FORMATS.append(ImageFormat(name, tuple(endings), recognises, opener, tuple(before), takes_channel_axis))
        image_formats.cache_clear()
        return opener

    return register


@cache
def image_formats() -> tuple[ImageFormat, ...]:
    """All formats, in the order in which they are asked. Raises a ValueError for some that are each to come before the other."""
    package = "widefield.images."
    for module in pkgutil.iter_modules([str(Path(__file__).parent)], package):
        importlib.import_module(module.name)
    for entry in entry_points(group="widefield.image_formats"):
        entry.load()
    formats = sorted(_FORMATS, key=lambda one: one.open.__module__)  # whatever was imported first
    earlier = {one: [other for other in formats if one.name in other.before] for one in formats}
    ordered = TopologicalSorter(earlier).static_order()
    return tuple(sorted(ordered, key=lambda one: one.open.__module__.startswith(package)))


class ForkSafeLock:
    """A lock that is free in a forked process, whoever held it: of all threads only the one that forked goes on there."""

    def __init__(self) -> None:
        self.renew()
        _LOCKS.add(self)

    def renew(self) -> None:
        """Forget who holds it."""
        self._lock = Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


_LOCKS: WeakSet[ForkSafeLock] = WeakSet()


def _renew_locks() -> None:
    for lock in _LOCKS:
        lock.renew()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_renew_locks)


class PerProcess:
    """Opens something once in each process, by a function: a forked one must not share a file's position or a codec's state."""

    def __init__(self, opening: Callable[[], Any]) -> None:
        self._opening, self._lock = opening, ForkSafeLock()
        self._opened: dict[int, Any] = {}

    def get(self) -> Any:
        """Return what was opened in this process, or open it now."""
        process = os.getpid()
        if process not in self._opened:
            with self._lock:
                if process not in self._opened:
                    self._opened = {process: self._opening()}
        return self._opened[process]

    def forget(self) -> None:
        """Open it anew the next time."""
        self._opened = {}


def is_remote(path: Path | str) -> bool:
    """True of a URL such as "s3://bucket/scan.zarr"."""
    return isinstance(path, str) and "://" in path


def optional(module: str, path: Path, extra: str) -> ModuleType:
    """Import a library that only an extra of the package brings.

    Raises:
        ImageReadError: It is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        reason = f"{error.name} is needed for it; install it with pip install 'widefield[{extra}]'"
        raise cannot_read(path, reason) from error


def position_name(name: str, axes: Iterable[str], at: Iterable[int]) -> str:
    """Return the name of one of the images of a stack, such as "image T=0 Z=4"."""
    return " ".join([name, *(f"{axis}={position}" for axis, position in zip(axes, at, strict=True))])


def all_named(names: Sequence[str | None], count: int) -> tuple[str, ...] | None:
    """Return the names of channels, None unless each of `count` has one."""
    return tuple(map(str, names)) if len(names) == count and all(names) else None


def choose_series(path: object, series: int | str | None, names: Sequence[str], sizes: Sequence[Size]) -> int:
    """The index of the image that is meant, of several in one file; without `series` that is the first, if it is the largest.

    Raises:
        ImageReadError: `series` is None and another image is as large as the first.
        ValueError: `series` is the index or name of none.
    """
    listed = ", ".join(
        f"{index}: {name} {h}x{w}" for index, (name, (h, w)) in enumerate(zip(names, sizes, strict=True))
    )
    if len(names) > 8:
        listed = f"{', '.join(listed.split(', ')[:8])}, ... {len(names) - 1}: {names[-1]}"
    if series is None:
        if any(height * width >= math.prod(sizes[0]) for height, width in sizes[1:]):
            reason = f"it holds several images, of which the first is not the largest alone ({listed})"
            raise cannot_read(path, f"{reason}; say which one with series=..., by its number or name")
        return 0
    if isinstance(series, numbers.Integral) and not isinstance(series, bool) and 0 <= series < len(names):
        return int(series)
    if isinstance(series, str) and names.count(series) == 1:
        return names.index(series)
    raise WrongArgumentError(f"series={series!r} of {path} does not exist; its images are {listed}")


def one_image(what: object, choice: Choice, pixels: Pixels, **facts: Any) -> Contents:
    """Return the contents of a file of one image at one level, with further `facts` about it.

    Raises:
        ValueError: Another image of it is asked for.
    """
    size = pixels.shape[1:]
    choose_series(what, choice.series, [getattr(what, "name", str(what))], [size])
    return Contents(levels=(size,), pixels=lambda level: pixels, **facts)


def check_reaches(path: object, size: int, end: int) -> None:
    """Raise an ImageReadError if the pixels of a file of `size` bytes would reach to `end`."""
    if end > size:
        raise cannot_read(path, f"it is truncated: it has {size} bytes, its pixels reach to {end}")


def choose_channels(path: object, chosen: Sequence[int | str], count: int, names: Sequence[str] | None) -> list[int]:
    """The indices of the channels that are asked for, by index or by name.

    Raises:
        ValueError: One of them does not exist, or none is given.
    """
    if isinstance(chosen, (str, bytes, Mapping)) or not hasattr(chosen, "__len__") or not len(chosen):
        raise ValueError(
            f"channels={chosen!r} for {path}; expected a list of channels such as [0, 1, 2], or None for all"
        )
    found = []
    for one in chosen:
        if isinstance(one, str) and names is not None and one in names:
            found.append(names.index(one))
        elif isinstance(one, numbers.Integral) and not isinstance(one, bool) and 0 <= one < count:
            found.append(int(one))
        else:
            near = difflib.get_close_matches(str(one), names or (), 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            there = f"0 to {count - 1}" + (f", named {', '.join(names)}" if names else ", without names")
            raise WrongArgumentError(f"channel {one!r} of {path} does not exist{hint}; its channels are {there}")
    return found


STRIP_BYTES = 16 * 2**20
"""Bytes of an image that are read at a time where all of it is read."""


def strips(image: Any, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the strips in which to read an image: the first row of each, and how many rows it has, of `STRIP_BYTES` at most.

    Args:
        image: An image or a label map.
        multiple: The rows of each strip but the last are a multiple of this, also where these are more bytes.
    """
    channels, height, width = image.shape
    rows = max(1, STRIP_BYTES // (channels * width * image.dtype.itemsize * multiple)) * multiple
    for top in range(0, height, rows):
        yield top, min(rows, height - top)


MAX_SEGMENT_BYTES = 2**32
"""Tiles, strips and chunks that decode to more are refused: each is decoded as a whole."""


MAX_PLANES = 2**20
"""Files of more positions in time, depth and the like are refused: each has a name."""


def check_planes(path: object, counts: Iterable[int]) -> None:
    """Raise an ImageReadError if there are too many positions; `counts` are those of each axis."""
    planes = math.prod(counts)
    if planes > MAX_PLANES:
        raise cannot_read(path, f"it has {planes} positions in time, depth and the like; the limit is {MAX_PLANES}")


def check_segment(path: object, kind: str, shape: Sequence[int], itemsize: int) -> None:
    """Raise an ImageReadError if a single tile, strip or chunk is too large to decode."""
    nbytes = math.prod(shape) * itemsize
    if nbytes > MAX_SEGMENT_BYTES:
        limit = f"{nbytes / 2**20:.0f} MiB when decoded; the limit is {MAX_SEGMENT_BYTES / 2**20:.0f} MiB"
        raise cannot_read(path, f"a single {kind} of it has {limit}. Save it in smaller tiles")


def whole_number(name: str, value: Any, what: object, least: int | None = None) -> int:
    """Return `value` as an int; `name` and `what` tell in the error whose it is.

    Raises:
        ValueError: It is no whole number, or below `least`.
    """
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        at_least = "" if least is None else f" of at least {least}"
        raise WrongArgumentError(f"{name}={value!r} for {what}; expected a whole number{at_least}")
    return number


def real_number(name: str, value: Any, what: object, expected: str, fits: Callable[[float], bool]) -> float:
    """Return `value`; a ValueError that says what is `expected`, unless it is a real number that `fits`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not fits(float(value)):
        raise WrongArgumentError(f"{name}={value!r} for {what}; expected {expected}")
    return float(value)


def check_level(level: int, levels: tuple[Size, ...], what: object) -> None:
    """Raise a ValueError that names the levels there are, unless `level` is one of them."""
    if not 0 <= level < len(levels):
        sizes = ", ".join(f"{index}: {height}x{width}" for index, (height, width) in enumerate(levels))
        raise WrongArgumentError(f"level {level} of {what} does not exist; its levels (height x width) are {sizes}")


_WARNED: set[str] = set()
"""Endings of file names that `warn_of_dropped_alpha` has been called for."""


def warn_of_dropped_alpha(path: object, channels: int) -> None:
    """Log that the last channel of a file is dropped, and how to keep it: once for each ending of file names."""
    ending = Path(str(path)).suffix.lower()
    if ending in _WARNED:
        return
    _WARNED.add(ending)
    _log.warning(
        "channel %d of %s is marked as alpha and dropped. If it holds data (near infrared is often marked so), keep it: "
        'open_image(..., alpha="keep"), data.alpha=keep in `fit`, transform_args.num_channels=%d in `pretrain`. '
        "Further %s files are not named",
        channels, path, channels, ending or "such",
    )  # fmt: skip


def micrometres(value: Any, unit: str | None) -> float:
    """`value` of `unit` in micrometres; NaN if either is unknown."""
    factor = _MICROMETRES.get((unit or "").strip().lower())
    return float("nan") if factor is None or value is None else float(value) * factor


_MICROMETRES = {
    **dict.fromkeys(("µm", "μm", "um", "\\u00b5m", "micron", "microns", "micrometer", "micrometre"), 1.0),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e4),
    **dict.fromkeys(("m", "meter", "metre"), 1e6),
    "inch": 25_400.0,
}


def has_data(pixels: np.ndarray, nodata: float | None) -> np.ndarray:
    """Return a boolean array, False where `pixels` hold no data: NaN, infinite, or the file's value `nodata` for that."""
    found = np.isfinite(pixels)
    return found if nodata is None else found & (pixels != nodata)


def known(y: float, x: float) -> Spacing | None:
    """(y, x) where both are above 0 and finite, else None."""
    return (y, x) if 0 < y < float("inf") and 0 < x < float("inf") else None
