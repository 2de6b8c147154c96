"""`open_image` and the image it returns."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from widefield.errors import WidefieldError
from widefield.images.arrays import of_array
from widefield.images.formats import (
    Alpha,
    ChannelAxis,
    Choice,
    Contents,
    ImageReadError,
    Palette,
    Pixels,
    Size,
    Transform,
    cannot_read,
    check_level,
    choose_channels,
    has_data,
    image_formats,
    is_remote,
    real_number,
    warn_of_dropped_alpha,
    whole_number,
)

MAX_CHANNELS = 2**16
"""Images of more channels are refused: no camera has so many, and a damaged header may."""

SPACING_TOLERANCE = 0.02
"""A level whose spacing differs from the one that is asked for by less than this share of it is taken as it is."""


class ImageFile:
    """One image of a file, at one level or spacing; only the regions that are asked for are read. Made by `open_image`.

    It pickles as its path and the arguments of `open_image` (a worker process opens the file anew), survives a fork, and any
    number of threads may read at the same time. No dataclass: Lightning takes those apart when it converts a batch.

    Attributes:
        path: The file; of an array a text that says so.
        level: Level of the pyramid that is read, 0 the largest.
        levels: (height, width) of every level, the largest first.
        spacing: Micrometres per pixel of this image, (y, x); None if the file doesn't say.
        channel_names: A name for each channel; None if the file doesn't say.
        nodata: Value of pixels that hold no data; None if the file doesn't say.
        fill: What takes the place of values that are no data, see `open_image`; None leaves them.
        crs: Coordinate reference system of a map, such as "EPSG:32632"; None if there is none.
        transform: (a, b, c, d, e, f) of a map: the corner (x, y) of a pixel of this image lies at (a x + b y + c, d x + e y + f).
        associated_images: Functions that read the pictures beside the image (label, macro, thumbnail), by name; each gives a uint8
            array (height, width, 3).
        background: What a model leaves out of the image, see `widefield.images.background`; None: nothing. It goes with the image
            through `pickle`, and changes nothing about `read`.
    """

    background: Any = None

    def __init__(
        self,
        source: Any,
        path: Path | str,
        arguments: Mapping[str, Any],
        level: int,
        contents: Contents,
        pixels: Pixels,
        channels: list[int],
    ) -> None:
        self._source, self.path = source, cast(Path, path)  # a string only of a URL or an array
        self.level, self.levels = level, contents.levels
        self.nodata, self.crs = contents.nodata, contents.crs
        self.associated_images = {
            name: partial(_beside, path, name, read) for name, read in contents.associated.items()
        }
        self.channel_names = contents.channel_names and tuple(contents.channel_names[channel] for channel in channels)
        self._arguments, self._pixels, self._channels = arguments, pixels, channels
        self.fill = arguments["fill"]
        scale = tuple(full / part for full, part in zip(contents.levels[0], pixels.shape[1:], strict=True))
        self.spacing = contents.spacing and (contents.spacing[0] * scale[0], contents.spacing[1] * scale[1])
        self.transform = contents.transform and scaled(contents.transform, *scale)

    def __repr__(self) -> str:
        return f"ImageFile(path={str(self.path)!r}, level={self.level}, shape={self.shape}, dtype={self.dtype})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return len(self._channels), *self._pixels.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        """Type of the pixels, in native byte order."""
        return self._pixels.dtype

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Read a region, given in pixels of this image.

        Returns:
            A writable array of shape (channels, height, width) and of type `dtype`, contiguous or not, that shares no
            memory with the file.

        Raises:
            ValueError: The region is empty or not wholly inside the image.
            ImageReadError: The file is truncated or corrupt where the region lies.
        """
        if not type(y) is type(x) is type(height) is type(width) is int:
            named = {"y": y, "x": x, "height": height, "width": width}
            least = -(2**63)  # what is too small is said with the size of the image
            y, x, height, width = (
                whole_number(name, one, f"a region of {self.path}", least) for name, one in named.items()
            )
        _, full_height, full_width = self.shape
        if height < 1 or width < 1 or y < 0 or x < 0 or y + height > full_height or x + width > full_width:
            raise ValueError(
                f"region (y={y}, x={x}, height={height}, width={width}) is empty or reaches outside of level "
                f"{self.level} of {self.path}, which has height {full_height} and width {full_width}; "
                "clip the region to the image"
            )
        try:
            pixels = self._pixels.read(y, x, height, width, self._channels)
        except ImageReadError:
            raise
        except Exception as error:  # decoders raise whatever damaged data lead them to
            problem = "not enough memory for" if isinstance(error, MemoryError) else "truncated or corrupt data in"
            where = f"y={y}, x={x}, height={height}, width={width}"
            raise cannot_read(self.path, f"{problem} the region {where} ({error})") from error
        if self.fill is not None:
            pixels[~has_data(pixels, self.nodata)] = self.fill
        return pixels

    def at_level(self, level: int) -> "ImageFile":
        """The same image, opened at another level."""
        return self.reopened(level=level, spacing=None)

    def reopened(self, **changes: Any) -> "ImageFile":
        """The same image, opened with other arguments of `open_image`."""
        return open_image(self._source, **{**self._arguments, **changes})

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(open_image, self._source, **self._arguments), (), {"background": self.background}


def _beside(path: Path | str, name: str, read: Callable[[], np.ndarray]) -> np.ndarray:
    """The picture beside an image that `read` gives."""
    try:
        return read()
    except ImageReadError:
        raise
    except Exception as error:  # as in `ImageFile.read`
        raise cannot_read(path, f"its picture {name!r} is truncated or corrupt ({error})") from error


def open_image(
    path: Any,
    level: int | None = None,
    *,
    spacing: float | None = None,
    series: int | str | None = None,
    channels: Sequence[int | str] | None = None,
    alpha: Alpha = "drop",
    palette: Palette = "colours",
    channel_axis: ChannelAxis | None = None,
    fill: float | None = None,
) -> ImageFile:
    """Open an image file for reading region by region; no pixels are read yet.

    The format is told by the file's content, not by its name; docs/formats.md lists all formats, with the extras of Widefield that
    some need. Other packages may register more, see `widefield.images.formats`.

    Values are as stored, whatever their type (1 to 64 bits, floats), and not rotated by EXIF orientation. A palette becomes RGB;
    CMYK of 8 bits becomes sRGB; where white is zero, unsigned grey is inverted. Tiles that were never written hold the file's value
    for missing data, else 0, in slides white. A last channel that is the transparency of a picture is dropped, with a warning in
    the log: alpha of PNG and WebP, or of TIFF as the only extra sample. A fourth band of a GeoTIFF always stays.

    Args:
        path: The file, or the folder of a Zarr image; of a Zarr image also a URL that fsspec knows, such as "s3://bucket/scan.zarr".
            Or an array or a tensor on the CPU, as in `.npy`.
        level: Level of a pyramid, 0 (the default) the largest.
        spacing: Micrometres per pixel, instead of a level. The level of this spacing, if one differs by less than 2%; else the next
            finer one, of which each pixel of the image is the mean of the area that it covers: an image of height H and spacing s
            becomes round(H s / `spacing`) pixels high. Integers are rounded; pixels without data do not count.
        series: Which image of a file that holds several, by index or name: of a stack every position in time or depth is an
            image. By default the first, which must be the largest, or the only one.
        channels: Which channels, by index or name, in this order. All by default.
        alpha: "keep" gives transparency like every other channel.
        palette: "indices" gives the stored indices of a TIFF, PNG, GIF or BMP file with a palette, not colours: a label image.
        channel_axis: Of arrays of three axes without names in `.npy` or Zarr: "first" for (C, H, W), "last" for (H, W, C). Needed
            only where the shape leaves it open: by default it is the smaller of the first and the last axis, if that has at most
            32 entries.
        fill: Takes the place of values that are no data: NaN, infinite, or the file's value for missing data. By default they stay.

    Raises:
        FileNotFoundError: There is no such file.
        ImageReadError: The file is of an unsupported format, truncated or corrupt, or holds several images of one size.
        ValueError: A level, spacing, series or channel does not exist, or another argument is wrong.

    Examples:
        >>> image = open_image("slides/tumor_001.tif", spacing=5.0)
        >>> image.read(0, 0, 20, 16).shape
        (3, 20, 16)
    """
    arguments = {
        "level": level,
        "spacing": spacing,
        "series": series,
        "channels": channels,
        "alpha": alpha,
        "palette": palette,
        "channel_axis": channel_axis,
        "fill": fill,
    }
    source, array = path, None if isinstance(path, (str, os.PathLike)) else np.asarray(path)
    if array is not None:
        path = f"an array of shape {array.shape} and type {array.dtype}"
    elif not is_remote(path):
        path = Path(path)
    if alpha not in ("drop", "keep"):
        raise ValueError(f'alpha={alpha!r} for {path}; expected "drop" or "keep"')
    if palette not in ("colours", "indices"):
        raise ValueError(f'palette={palette!r} for {path}; expected "colours" or "indices"')
    if channel_axis not in ("first", "last", None):
        raise ValueError(f'channel_axis={channel_axis!r} for {path}; expected "first", "last" or None')
    if level is not None and spacing is not None:
        raise ValueError(f"level={level} and spacing={spacing} were both given for {path}; give one of them")
    if level is not None:
        level = whole_number("level", level, path)
    if spacing is not None:
        expected = "micrometres per pixel, above 0"
        spacing = real_number("spacing", spacing, path, expected, lambda number: 0 < number < math.inf)
    choice = Choice(series, channel_axis, palette)
    contents = _contents(path, choice) if array is None else of_array(path, array, choice)
    level, target = (level or 0, None) if spacing is None else _level_of(path, contents, spacing)
    check_level(level, contents.levels, path)
    pixels = contents.pixels(level)
    if pixels.shape[0] > MAX_CHANNELS:
        raise cannot_read(path, f"it has {pixels.shape[0]} channels; the limit is {MAX_CHANNELS}")
    if 0 in pixels.shape:
        raise cannot_read(path, f"it has no pixels: {pixels.shape[0]} channels of {pixels.shape[1]}x{pixels.shape[2]}")
    if fill is not None:
        bounds = np.iinfo(pixels.dtype) if pixels.dtype.kind in "ui" else None
        expected = f"a value of its type {pixels.dtype}, from {bounds.min} to {bounds.max}" if bounds else "a number"
        real_number("fill", fill, path, expected, lambda number: not bounds or bounds.min <= number <= bounds.max)
    if target is not None and target != pixels.shape[1:]:
        pixels = _AveragedPixels(pixels, target, contents.nodata)
    every = list(range(pixels.shape[0]))
    if channels is not None:
        every = choose_channels(path, channels, len(every), contents.channel_names)
    elif contents.has_alpha and alpha == "drop" and len(every) > 1:
        warn_of_dropped_alpha(path, len(every))
        every.pop()
    return ImageFile(source, path, arguments, level, contents, pixels, every)


def _contents(path: Path | str, choice: Choice) -> Contents:
    start = b""
    if isinstance(path, Path) and not path.exists():
        raise FileNotFoundError(f"cannot read {path}: there is no such file")
    if isinstance(path, Path) and path.is_file():
        with path.open("rb") as file:
            start = file.read(256)
        if not start:
            raise cannot_read(path, "the file is empty")
    for one in image_formats():
        if one.recognises(path, start):
            if choice.channel_axis is not None and not one.takes_channel_axis:
                takers = " and ".join(other.endings[0] for other in image_formats() if other.takes_channel_axis)
                raise ValueError(
                    f"channel_axis={choice.channel_axis!r} for {path}, but only {takers} leave it open; omit it"
                )
            try:
                contents = one.open(path, choice)
                if any(not isinstance(n, int) or n < 0 for level in contents.levels for n in level):
                    raise ValueError(f"its levels are {contents.levels}")
                return contents
            except (WidefieldError, FileNotFoundError):
                raise
            except Exception as error:  # readers raise whatever a damaged header leads them to
                reason = f"its structure is truncated or damaged ({type(error).__name__}: {error})"
                raise cannot_read(path, reason) from error
    if not start:
        raise cannot_read(path, "it is a folder, and no Zarr image; give the path of an image file")
    names = sorted((one.name for one in image_formats() if one.endings), key=str.lower)
    raise cannot_read(path, f"its content is none of {', '.join(names)}; convert it to one of these")


def _level_of(path: Path | str, contents: Contents, spacing: float) -> tuple[int, Size | None]:
    """The level to read for a spacing, and the size to reduce it to (None: as it is)."""
    if contents.spacing is None:
        raise ValueError(
            f"spacing={spacing:g} was asked for of {path}, which does not say its own; give level=... instead"
        )
    (height, width), (y, x) = contents.levels[0], contents.spacing
    ratios = [(spacing / (y * height / rows), spacing / (x * width / columns)) for rows, columns in contents.levels]
    fitting = [k for k, ratio in enumerate(ratios) if all(abs(one - 1) < SPACING_TOLERANCE for one in ratio)]
    if fitting:
        return fitting[0], None
    finer = [k for k, ratio in enumerate(ratios) if min(ratio) >= 1]
    if not finer:
        raise ValueError(
            f"spacing={spacing:g} was asked for of {path}, whose finest is {max(contents.spacing):g} micrometres per pixel; "
            "ask for that or a coarser one, pixels are not made up"
        )
    return finer[-1], (max(1, round(height * y / spacing)), max(1, round(width * x / spacing)))


def scaled(transform: Transform, y: float, x: float) -> Transform:
    """Return the transform of an image whose pixels are y times as high and x times as wide."""
    a, b, c, d, e, f = transform
    return a * x, b * y, c, d * x, e * y, f


@dataclass(frozen=True)
class _AveragedPixels:
    """An image made smaller: each pixel is the mean of the area that it covers of another one."""

    pixels: Pixels
    size: Size
    nodata: float | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.pixels.shape[0], *self.size

    @property
    def dtype(self) -> np.dtype:
        """Type of the pixels."""
        return self.pixels.dtype

    def read(self, y: int, x: int, height: int, width: int, channels: Sequence[int]) -> np.ndarray:
        """Array (channels, height, width)."""
        full = self.pixels.shape[1:]
        rows, row_weights = _covered(y, height, full[0], self.size[0])
        columns, column_weights = _covered(x, width, full[1], self.size[1])
        top, left = int(rows.min()), int(columns.min())
        part = self.pixels.read(top, left, int(rows.max()) - top + 1, int(columns.max()) - left + 1, channels)
        weights = rows - top, row_weights, columns - left, column_weights
        if self.nodata is None and self.dtype.kind != "f":
            mean = _weighted(part.astype(np.float64), *weights)
        else:
            found = has_data(part, self.nodata)
            total = _weighted(np.where(found, part, 0).astype(np.float64), *weights)
            share = _weighted(found.astype(np.float64), *weights)
            empty = math.nan if self.nodata is None else self.nodata
            mean = np.where(share > 0, total / np.where(share > 0, share, 1), empty)
        if self.dtype.kind == "f":
            return mean.astype(self.dtype)
        greatest = float(np.iinfo(self.dtype).max)
        if self.dtype.itemsize == 8:  # of these the greatest is no float
            greatest = math.nextafter(greatest, 0)
        return np.minimum(np.rint(mean), greatest).astype(self.dtype)


def _covered(first: int, count: int, full: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that each of `count` pixels covers when `full` become `size`, and their shares of it: two arrays (count, n)."""
    step = full / size
    start = np.arange(first, first + count)[:, None] * step
    pixels = np.floor(start).astype(np.int64) + np.arange(math.ceil(step) + 1)
    shares = np.clip(np.minimum(pixels + 1, start + step) - np.maximum(pixels, start), 0, None) / step
    shares[pixels >= full] = 0
    return np.minimum(pixels, full - 1), shares / shares.sum(1, keepdims=True)


def _weighted(
    pixels: np.ndarray, rows: np.ndarray, row_weights: np.ndarray, columns: np.ndarray, column_weights: np.ndarray
) -> np.ndarray:
    """Weighted sums over rows and columns, added up in an order that does not depend on the region."""
    pixels = sum(pixels[:, rows[:, k]] * row_weights[:, k, None] for k in range(rows.shape[1]))  # type: ignore[assignment]
    return sum(pixels[:, :, columns[:, k]] * column_weights[:, k] for k in range(columns.shape[1]))  # type: ignore[return-value]
