"""Batch norm statistics of a network that was never trained.

Streaming evaluates batch norm with its running statistics. Those of a freshly made network are mean 0 and variance 1,
which describe none of its layers: activations grow or shrink from layer to layer and training starts from noise. A few
train-mode passes over random crops give statistics that do describe them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from widefield.streaming.module import StreamingCNN
from widefield.streaming.tiles import Normalisation, copied


def calibrate_batch_norm(
    model: nn.Module,
    images: Sequence[Any],
    *,
    crop_size: int = 512,
    crops: int = 64,
    batch_size: int = 8,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    value_range: tuple[float, float] | None = None,
    masks: Sequence[Any] | None = None,
    generator: torch.Generator | None = None,
) -> int:
    """Set the running statistics of every batch norm layer to their average over random crops of `images`.

    The statistics of each batch of crops count by the number of crops in it, so each crop has the same weight in the
    cumulative average, whatever the layers' momentum. Nothing else of the model changes: parameters, momentum, mode flags
    and other buffers stay; dropout is off during the passes. `num_batches_tracked`, which belongs to the statistics,
    becomes the number of batches.

    Args:
        model: A module that maps (N, C, h, w) to anything, or a `StreamingCNN`: then its module is calibrated, with the
            normalisation that it was made with.
        images: Tensors of shape (N, C, H, W) or (C, H, W), or lazy images with `shape` (C, H, W), `dtype` and
            `read(y, x, height, width)`; raw pixels as the model will get them. Only the crops are read.
        crop_size: Side of a crop in pixels; less where at least half of the images are smaller. Images that are too small
            for a crop are left out then.
        crops: Number of crops, spread evenly over the images.
        batch_size: Crops in one pass. Statistics of one pass are biased for small batches of small crops.
        mean: Per channel, subtracted from the pixels; see `StreamingCNN`.
        std: Per channel, what the pixels are divided by; see `StreamingCNN`.
        value_range: What float pixels mean; see `StreamingCNN`.
        masks: For each image a boolean array (rows, columns) over the whole of it, of any coarser size: the middles of crops are
            drawn where it is True, or anywhere if it is so nowhere.
        generator: Draws the crops; a CPU generator. By default torch's global one.

    Returns:
        The number of layers calibrated; 0 for a model without batch norm.

    Raises:
        ValueError: No images, not a mask for each, a number below 1, or a normalisation given along with a `StreamingCNN`.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> wf.calibrate_batch_norm(network, [torch.rand(3, 64, 64)], crop_size=32, crops=4, batch_size=2)
        1
    """
    for name, number in (("crop_size", crop_size), ("crops", crops), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"calibrate_batch_norm got {name}={number}; it must be at least 1")
    if not len(images):
        raise ValueError("calibrate_batch_norm got no images; give at least one tensor or lazy image")
    module, normalisation = _unwrap(model, Normalisation.parse(mean, std, value_range))
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]
    if not layers:
        return 0
    if masks is not None and len(masks) != len(images):
        raise ValueError(f"calibrate_batch_norm got {len(masks)} masks for {len(images)} images; give one for each")
    extents = [min(_size(image)) for image in images]
    side = min(crop_size, sorted(extents)[len(extents) // 2])
    chosen = [index for index, extent in enumerate(extents) if extent >= side]
    parameter = next(module.parameters())
    with _collecting(module, layers), torch.no_grad():
        for start in range(0, crops, batch_size):
            batch = [
                _random_crop(images[index], None if masks is None else masks[index], side, generator)
                for index in (chosen[crop % len(chosen)] for crop in range(start, min(start + batch_size, crops)))
            ]
            for layer in layers:
                layer.momentum = len(batch) / (start + len(batch))
            module(torch.cat([_prepare(crop, normalisation, parameter) for crop in batch]))
    return len(layers)


def _unwrap(model: nn.Module, given: Normalisation) -> tuple[nn.Module, Normalisation]:
    """The module to run and the normalisation of its input."""
    if not isinstance(model, StreamingCNN):
        return model, given
    if given != Normalisation.parse(None, None, None):
        raise ValueError(
            "calibrate_batch_norm got mean, std or value_range along with a StreamingCNN, which has its own; omit them"
        )
    return model.module, model.normalisation


@contextmanager
def _collecting(module: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    """Batch norm layers in training mode with fresh statistics, everything else in eval mode; modes and momenta restored."""
    modes = [(part, part.training) for part in module.modules()]
    momenta = [layer.momentum for layer in layers]
    try:
        module.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
        yield
    finally:
        for part, training in modes:
            part.training = training
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _size(image: Any) -> tuple[int, int]:
    height, width = image.shape[-2:]
    return int(height), int(width)


def _random_crop(image: Any, mask: Any, side: int, generator: torch.Generator | None) -> Tensor:
    """A crop of shape (1, C, side, side); of a batch of several images, each crop takes one."""
    size = _size(image)
    cells = None if mask is None else torch.as_tensor(mask).nonzero()
    if cells is None or not len(cells):
        y, x = (_draw(extent - side + 1, generator) for extent in size)
    else:
        cell = cells[_draw(len(cells), generator)].tolist()
        share = torch.rand(2, generator=generator, device=_device(generator)).tolist()
        middles = ((c + s) * n / m for c, s, n, m in zip(cell, share, size, mask.shape, strict=True))
        y, x = (min(max(0, round(middle - side / 2)), n - side) for middle, n in zip(middles, size, strict=True))
    if not isinstance(image, Tensor):
        return copied(image.read(y, x, side, side))[None]  # a reader may use its memory again
    batch = image if image.ndim == 4 else image[None]
    index = _draw(len(batch), generator)
    return batch[index : index + 1, :, y : y + side, x : x + side]


def _prepare(crop: Tensor, normalisation: Normalisation, like: Tensor) -> Tensor:
    """The crop as the network sees it in a scan, on the device and in the dtype of `like`."""
    crop = crop.to(like.device)
    return normalisation.apply(crop.to(like.dtype) if crop.is_floating_point() else crop, like.dtype)


def _draw(upper: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(upper, (), generator=generator, device=_device(generator)))


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
