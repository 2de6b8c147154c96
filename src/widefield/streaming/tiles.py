"""Sources of tiles: a tensor, or an image on disk that is never held whole; and the normalisation of a tile."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from widefield.streaming.captured import MapInput
from widefield.streaming.foreground import Foreground
from widefield.streaming.store import Store

# CUDA chooses between values of signed types only.
_SAME_BITS = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


@runtime_checkable
class LazyImage(Protocol):
    """An image that is read region by region.

    `shape` is (channels, height, width), `dtype` a NumPy or torch dtype. `read` takes a region in pixels and returns an array or
    tensor of shape (channels, height, width) and this dtype. A scan calls it from a thread of its own, one call at a time.

    Examples:
        >>> class Noise:
        ...     shape, dtype = (3, 90, 70), torch.float32
        ...     def read(self, y, x, height, width):
        ...         return torch.rand(3, height, width)
        >>> wf.stream(nn.Conv2d(3, 2, 3), tile_size=32)(Noise()).shape
        torch.Size([1, 2, 88, 68])
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def dtype(self) -> Any: ...
    def read(self, y: int, x: int, height: int, width: int) -> Any: ...


@dataclass(frozen=True)
class Normalisation:
    """Normalisation of each tile: range to 0..1, then `(x - mean) / std` per channel.

    Integer images are divided by their dtype's maximum; float images are taken as they are. `value_range` = (low, high) says
    otherwise: low becomes 0 and high 1.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    value_range: tuple[float, float] | None = None

    @classmethod
    def parse(cls, mean: Any, std: Any, value_range: Any) -> "Normalisation":
        """Check and convert what a user gave. Raises ValueError."""
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std go together: got mean={mean}, std={std}; give both or neither")
        mean, std = (
            None if v is None else tuple(float(x) for x in ([v] if isinstance(v, (int, float)) else v))
            for v in (mean, std)
        )
        if mean is not None and std is not None:
            if len(mean) != len(std) or not mean:
                raise ValueError(f"mean and std need one value per channel each: got {len(mean)} and {len(std)} values")
            if not all(map(math.isfinite, mean)) or not all(math.isfinite(s) and s > 0 for s in std):
                raise ValueError(f"mean must be finite and std finite and positive: got mean={mean}, std={std}")
        if value_range is not None:
            value_range = tuple(float(x) for x in value_range)
            if len(value_range) != 2 or not value_range[0] < value_range[1]:
                raise ValueError(
                    f"value_range must be (low, high) with low < high, such as (0, 255): got {value_range}"
                )
        return cls(mean, std, value_range)

    def check_channels(self, channels: int) -> None:
        """Raises ValueError when `mean` and `std` are for another number of channels."""
        if self.mean is not None and len(self.mean) not in (1, channels):
            raise ValueError(
                f"mean and std have {len(self.mean)} values, the image has {channels} channels; give one per channel"
            )

    def apply(self, tile: Tensor, dtype: torch.dtype) -> Tensor:
        """A normalised tile (N, C, height, width) of `dtype` (float tiles keep theirs); `tile` itself is not changed.

        Raises ValueError for a float tile with values above 2 or below -0.5 that is to be normalised, unless `value_range` was
        given: most likely it was not scaled to 0..1, or it is normalised already.
        """
        if tile.is_floating_point() and self.mean is not None and self.value_range is None and tile.numel():
            low, high = (float(x) for x in torch.aminmax(tile.detach()))
            if low < -0.5 or high > 2.0:
                raise ValueError(
                    f"a float image with values from {low:g} to {high:g} is to be normalised with mean={self.mean}, std=..., which "
                    "are meant for values from 0 to 1. Scale the image to 0..1, or say what its values mean with "
                    "value_range=(0, 255) or the like; if it is normalised already, give no mean and std (normalize_on_gpu=False)."
                )
        return self.unchecked(tile, dtype)

    def unchecked(self, tile: Tensor, dtype: torch.dtype) -> Tensor:
        """`apply` as arithmetic alone, which can be traced."""
        low, high = self.value_range or (0.0, _top(tile.dtype))
        whole_numbers = not tile.is_floating_point()
        if whole_numbers:
            tile = tile.to(torch.promote_types(dtype, torch.float32))  # 65535 is infinite in float16
        if (low, high) != (0.0, 1.0):
            tile = (tile - low) / (high - low) if low else tile / high
        if self.mean is not None and self.std is not None:
            mean, std = (
                torch.tensor(v, dtype=tile.dtype, device=tile.device).view(-1, 1, 1) for v in (self.mean, self.std)
            )
            tile = (tile - mean) / std
        return tile.to(dtype) if whole_numbers else tile


def _top(dtype: torch.dtype) -> float:
    """The value that stands for 1: the maximum of an integer dtype."""
    return 1.0 if dtype.is_floating_point or dtype == torch.bool else float(torch.iinfo(dtype).max)


def pixel_dtype(image: Tensor | LazyImage) -> torch.dtype:
    """The dtype that an image declares. Raises ValueError if it is none of real or whole numbers."""
    dtype = image.dtype
    if not isinstance(dtype, torch.dtype):
        try:
            dtype = copied(np.empty(0, dtype or object)).dtype
        except TypeError as error:
            raise ValueError(
                f"the dtype of {image!r} must be one of NumPy's or torch's numbers: got {dtype!r}"
            ) from error
    if dtype.is_complex:
        raise ValueError(
            f"the image is {dtype}, and only real ones are streamed: give its real and imaginary parts as channels"
        )
    return dtype


def copied(pixels: Any) -> Tensor:
    """A tensor of pixels with memory of its own: the reader may use its memory for the next tile."""
    if isinstance(pixels, Tensor):
        return pixels.detach().clone()
    array = np.asarray(pixels)
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))


@dataclass(frozen=True)
class TileReader:
    """Reads the tiles of a stage input: `read` gives raw tiles on the scan's device, `normalised` what the network sees of one.

    Only the image has a `normalisation`; weights as large as the image are taken as they are.

    `data` is a tensor (its height and width in dimensions `dims`) or a lazy image, of which a tile is a batch of one; `origin` is
    where the tensor begins in the whole map. `store` is where the tensor lives and its gradient will, None for tensors that the
    user or a layer made. `channels` are those that a lazy image is planned with, None for those that it has now. Of an image with
    a `foreground`, what lies outside of it is replaced by `fill`, values of a pixel as it is stored.
    """

    data: Tensor | LazyImage
    device: torch.device
    dtype: torch.dtype
    normalisation: Normalisation | None = None
    dims: tuple[int, int] = (2, 3)
    memory_format: torch.memory_format | None = None
    store: Store | None = None
    channels: int | None = None
    origin: tuple[int, int] = (0, 0)
    foreground: Foreground | None = None
    fill: tuple[float, ...] = (0.0,)

    def gradient(self, tensor: Tensor, zeros: bool) -> Tensor:
        """A tensor for the gradient of the whole input `tensor`, of zeros or empty."""
        if self.store is None:
            return torch.zeros_like(tensor)
        return (self.store.zeros if zeros else self.store.empty)(tuple(tensor.shape), tensor)

    def view(self, whole: Tensor, y: int, x: int, height: int, width: int) -> Tensor:
        """A region of `data`, or of its gradient, as a view. What has height or width 1 is meant for all rows or columns."""
        for dim, start, size, origin in zip(self.dims, (y, x), (height, width), self.origin, strict=True):
            whole = whole if whole.shape[dim] == 1 else whole.narrow(dim, start - origin, size)
        return whole

    def read(self, y: int, x: int, height: int, width: int) -> Tensor:
        """A raw tile on the scan's device."""
        return self.to_device(self.fetch(y, x, height, width))

    def fetch(self, y: int, x: int, height: int, width: int) -> Tensor:
        """A raw tile where it can be moved to the scan's device from: what a thread in the background can do."""
        if isinstance(self.data, Tensor):
            return self.view(self.data, y, x, height, width)
        pixels = self.data.read(y, x, height, width)
        call = f"{self.data!r}.read({y}, {x}, {height}, {width})"
        planned = (self.channels or self.data.shape[0], height, width)
        try:
            tile = copied(pixels)
        except (TypeError, ValueError) as error:
            given = f"{type(pixels).__name__} {pixels!r:.100}"
            raise ValueError(f"{call} returned {given}, expected an array or tensor of shape {planned}") from error
        del pixels
        if tuple(tile.shape) != planned:
            raise ValueError(f"{call} returned shape {tuple(tile.shape)}, expected {planned}")
        if tile.dtype != (declared := pixel_dtype(self.data)):
            raise ValueError(
                f"{call} returned {tile.dtype}, but the image declares {declared}, by which its values are scaled: "
                "make read() and dtype agree"
            )
        tile = tile[None].to(self.dtype if tile.is_floating_point() else tile.dtype)
        return tile.pin_memory() if self.device.type == "cuda" and tile.device.type == "cpu" else tile

    def to_device(self, tile: Tensor) -> Tensor:
        """Return what `fetch` gave, on the scan's device."""
        return tile.to(self.device, non_blocking=True)

    def normalised(self, raw: Tensor, y: int, x: int) -> Tensor:
        """Return a raw tile that begins at (y, x) as the network sees it: normalised if it is one of the image.

        It is differentiable in `raw`. Raises ValueError as `Normalisation.apply` does.
        """
        if self.foreground is not None:
            extent = self.data.shape[-2:]
            mask = self.foreground.tile(extent, y, x, raw.shape[2], raw.shape[3], raw.device)[:, None]
            dtype, bits = raw.dtype, _SAME_BITS.get(raw.dtype, raw.dtype)
            fill = torch.tensor(self.fill, dtype=torch.float64, device="cpu").to(dtype)  # as uint64 cannot be made
            if bits != dtype:
                raw, fill = raw.view(bits), fill.view(bits)  # not differentiable
            raw = torch.where(mask, raw, fill.to(raw.device).view(-1, 1, 1))
            raw = raw if bits == dtype else raw.view(dtype)
        tile = raw if self.normalisation is None else self.normalisation.apply(raw, self.dtype)
        return tile if self.memory_format is None else tile.contiguous(memory_format=self.memory_format)


def map_input(given: Any, image_shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> MapInput:
    """Return what a capture needs to know of a map that is given beside an image. Raises ValueError if it does not go with it."""
    if isinstance(given, Tensor):
        shape, found, needed = tuple(given.shape), given.dtype, given.requires_grad
        if given.device != device and given.device.type not in ("cpu", "meta"):
            raise ValueError(f"a map is on {given.device}, the module on {device}; move one of them")
    elif isinstance(given, LazyImage):
        shape, found, needed = (1, *(int(n) for n in given.shape)), pixel_dtype(given), False
        found = dtype if found.is_floating_point else found
    else:
        raise ValueError(
            "expected a map (N, C, h, w) or (N, h, w), or an object with shape (C, h, w), dtype and read(y, x, height, width): "
            f"got {type(given).__name__}"
        )
    fits = len(shape) in (3, 4) and shape[0] == image_shape[0] and 0 not in shape
    if not fits or any(n % m for n, m in zip(image_shape[2:], shape[-2:], strict=True)):
        raise ValueError(
            f"a map of shape {shape} does not go with an image of shape {tuple(image_shape)}: it must be (N, C, h, w) or "
            "(N, h, w), N as for the image, with a height and width that are those of the image or whole fractions of them"
        )
    return MapInput(shape, found, needed)


def read_whole(given: Tensor | LazyImage, found: MapInput, device: torch.device) -> Tensor:
    """Return all of a map that `map_input` has found to be right."""
    ndim = len(found.shape)
    return TileReader(given, device, found.dtype, dims=(ndim - 2, ndim - 1)).read(0, 0, *found.shape[-2:])
