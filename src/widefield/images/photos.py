"""Pictures in PNG, JPEG, WebP and the like, which are decoded once, from top to bottom, to memory or to a temporary file.

libvips decodes, always in the calling thread: `Region.fetch` is used and never `write_to_memory`, `numpy` or `thumbnail`. Those
start libvips' thread pool, after which a forked process (a DataLoader worker on Linux) hangs for good at its own first use of the
pool.
"""

import math
import re
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyvips

from widefield.images.arrays import ArrayPixels, MappedArray
from widefield.images.formats import Choice, Contents, ForkSafeLock, cannot_read, image_format, one_image

MEMORY_BYTES = 64 * 2**20
"""An image that decodes to more than this many bytes goes to a temporary file."""

MAX_DECODED_BYTES = 2**36
"""Pictures that decode to more are refused: they are decoded as a whole."""

STRIP_BYTES = 256 * 2**10
"""Bytes that are decoded at a time."""

_OPENING = ForkSafeLock()


_ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp")
_MAGIC = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)


@image_format("PNG, JPEG, WebP", endings=_ENDINGS, recognises=lambda path, start: bool(_MAGIC.match(start)))
def open_photo(path: Path, choice: Choice) -> Contents:
    """Open a PNG, JPEG or WebP file."""
    if choice.palette == "indices" and (indices := _palette_indices(path)) is not None:
        return one_image(path, choice, ArrayPixels(indices, "YX"))
    image = _load(path)
    pixels = _DecodedPixels(path, (image.bands, image.height, image.width), dtype_of(image))
    if (nbytes := math.prod(pixels.shape) * pixels.dtype.itemsize) > MAX_DECODED_BYTES:
        size = f"{image.width}x{image.height} pixels, {nbytes / 2**30:.0f} GiB when decoded"
        raise cannot_read(
            path, f"it has {size}; the limit is {MAX_DECODED_BYTES / 2**30:.0f} GiB. Save it as a tiled TIFF"
        )
    return one_image(path, choice, pixels, has_alpha=image.hasalpha())


@image_format(
    "BMP, GIF", endings=(".bmp", ".gif"), recognises=lambda path, start: start.startswith((b"BM", b"GIF87a", b"GIF89a"))
)
def open_bmp(path: Path, choice: Choice) -> Contents:
    """Open a BMP file or the first picture of a GIF file, into memory."""
    with PIL.Image.open(path) as image:
        pixels = np.array(image.convert("RGB") if image.mode == "P" and choice.palette == "colours" else image)
    return one_image(path, choice, ArrayPixels(pixels, "YXC"[: pixels.ndim]))


def _palette_indices(path: Path) -> np.ndarray | None:
    """The indices of a PNG file with a palette, (height, width); None of another file."""
    try:
        with PIL.Image.open(path) as image:
            return np.asarray(image) if image.mode == "P" else None
    except (OSError, SyntaxError) as error:
        raise cannot_read(path, f"it is damaged ({error})") from error


@dataclass(frozen=True)
class _DecodedPixels:
    """Pixels decoded at the first read. A file that fails to decode fails again at every read."""

    path: Path
    shape: tuple[int, int, int]
    """(channels, height, width)."""
    dtype: np.dtype[Any]
    _lock: Any = field(default_factory=ForkSafeLock, repr=False)
    _decoded: list[ArrayPixels] = field(default_factory=list, repr=False)
    """Empty until the first read."""

    def read(self, y: int, x: int, height: int, width: int, channels: Sequence[int]) -> np.ndarray:
        """Array (channels, height, width), a copy."""
        with self._lock:
            if not self._decoded:
                self._decoded.append(ArrayPixels(self._decode(), "YXC"))
        return self._decoded[0].read(y, x, height, width, channels)

    def _decode(self) -> np.ndarray | MappedArray:
        channels, height, width = self.shape
        if math.prod(self.shape) * self.dtype.itemsize > MEMORY_BYTES:
            file = temporary_file(self.path, self._strips())
            weakref.finalize(self, file.close)
            return MappedArray(file, 0, (height, width, channels), self.dtype)
        return np.concatenate(list(self._strips()))

    def _strips(self) -> Iterator[np.ndarray]:
        """All rows from top to bottom, as arrays (rows, width, channels)."""
        channels, height, width = self.shape
        region = pyvips.Region.new(_load(self.path))
        rows = max(1, STRIP_BYTES // (channels * width * self.dtype.itemsize))
        for y in range(0, height, rows):
            yield fetch(region, self.dtype, y, 0, min(rows, height - y), width)


def temporary_file(path: Path, parts: Iterator[np.ndarray]) -> BufferedRandom:
    """A nameless file of the bytes of all `parts`, for pixels of the file at `path` that are too many for memory.

    Raises:
        ImageReadError: The folder of temporary files has no room for it.
    """
    file = tempfile.TemporaryFile(prefix="widefield-")  # noqa: SIM115 - the caller closes it
    size = 0
    for part in parts:
        size += part.nbytes
        try:
            file.write(np.ascontiguousarray(part).data)
            file.flush()
        except OSError as error:
            folder = tempfile.gettempdir()
            reason = f"more than {size / 2**20:.0f} MiB of decoded pixels do not fit into {folder} ({error})"
            raise cannot_read(path, f"{reason}; point TMPDIR elsewhere") from error
    return file


def _load(path: Path) -> pyvips.Image:
    """A libvips image of `path`, in grey, RGB or as many bands as there are; alpha included.

    Raises:
        ImageReadError: It is damaged at its start.
    """
    forget_errors()
    try:
        with _kept_out_of_cache():
            # not at warnings: libpng and libjpeg warn of harmless colour profiles and stray bytes, which cameras do write
            image = pyvips.Image.new_from_file(str(path), access="sequential", fail_on="error")
        if image.interpretation == "cmyk":
            image = image.colourspace("srgb")
    except pyvips.Error as error:
        raise cannot_read(path, describe(error)) from error
    bits = image.get("bits-per-sample") if image.get_typeof("bits-per-sample") else 8
    if bits < 8 and image.bands <= 2:  # libpng spreads grey of 1, 2 and 4 bits over 0 to 255
        image = (image // [255 // (2**bits - 1), 1][: image.bands]).cast("uchar")
    return image


@contextmanager
def _kept_out_of_cache() -> Iterator[None]:
    """Keep what is opened in this block out of libvips' operation cache, which empties it.

    The cache belongs to the process. It would keep an image alive after its last user, and give the earlier pixels of a file that
    was written again under its name.
    """
    with _OPENING:
        size = pyvips.cache_get_max()
        pyvips.cache_set_max(0)
        try:
            yield
        finally:
            pyvips.cache_set_max(size)


def dtype_of(image: pyvips.Image) -> np.dtype:
    """The NumPy type of the pixels of a libvips image that are not complex."""
    return np.dtype(pyvips.vimage.FORMAT_TO_TYPESTR[image.format])


def fetch(region: pyvips.Region, dtype: np.dtype, y: int, x: int, height: int, width: int) -> np.ndarray:
    """Pixels of type `dtype` as an array (height, width, bands); a ValueError if they are damaged.

    A `pyvips.Region` belongs to the thread that made it.
    """
    forget_errors()
    try:
        data = region.fetch(x, y, width, height)
    except pyvips.Error as error:
        raise ValueError(describe(error)) from error
    return np.frombuffer(data, dtype).reshape(height, width, -1)


def forget_errors() -> None:
    """Empty libvips' list of errors, which keeps warnings about files that were read well, before an operation.

    The list belongs to the process: what another thread fails at in the meantime can still get into a message.
    """
    pyvips.vips_lib.vips_error_clear()


def describe(error: pyvips.Error) -> str:
    """Return the last messages of libvips in one line, or that the file is damaged where it has none."""
    lines = dict.fromkeys(line.strip() for line in error.detail.splitlines() if line.strip())
    return "; ".join(lines) or "it is truncated or damaged"
