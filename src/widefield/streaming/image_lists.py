"""A list of images in one call: each by itself, or all as one batch where norm layers take the statistics of the batch."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from widefield.streaming.module import StreamingCNN


def results_of_each(
    network: "StreamingCNN", images: Sequence[Any], maps: Sequence[Any], region: Any, mask: Any, fill: Any, gather: bool
) -> list[Any]:
    """Return the result for each of `images`; `mask` and each of `maps` have one for each, the rest is that of `forward`.

    Raises:
        ValueError: Their numbers differ, or they cannot be one batch, which `batch_statistics="exact"` needs.
    """
    for k, of_each in enumerate(maps, 1):
        if not isinstance(of_each, (list, tuple)) or len(of_each) != len(images):
            given = f"{len(of_each)}" if isinstance(of_each, (list, tuple)) else type(of_each).__name__
            raise ValueError(f"a list of {len(images)} images needs a list of as many maps: map {k} is {given}")
    if network.batch_statistics == "exact" and images:
        if region is not None or mask is not None:
            raise ValueError(
                'batch_statistics="exact" takes a list as one batch, without region and mask: pass a tensor (N, C, H, W)'
            )
        return _as_batch(network, images, maps, gather)
    masks = [mask] * len(images) if mask is None or callable(mask) else mask
    if not isinstance(masks, (list, tuple)) or len(masks) != len(images):
        raise ValueError(f"a list of {len(images)} images needs a list of as many masks, or a function of an image")
    return [
        network(image, *others, region=region, mask=one, fill=fill, gather=gather)
        for image, one, *others in zip(images, masks, *maps, strict=True)
    ]


def _as_batch(
    network: Callable[..., Any], images: Sequence[Any], maps: Sequence[Sequence[Any]], gather: bool
) -> list[Any]:
    """The results of `images`, normalised by the statistics of all of them."""
    for image in (x for of_each in (images, *maps) for x in of_each):
        if not isinstance(image, Tensor):
            raise ValueError(
                f'batch_statistics="exact" takes a list as one batch of tensors: got {type(image).__name__}. '
                "Pass one image at a time, or read them into one tensor"
            )
    shapes = {tuple(image.shape[-3:]) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            'batch_statistics="exact" takes the statistics of a batch, which are defined for images of one size: got '
            f"{', '.join(map(str, sorted(shapes)))}. Pass tensors of one size, or one image at a time"
        )
    for of_each in (images, *maps):
        if len(dtypes := {x.dtype for x in of_each}) > 1:
            raise ValueError(
                f'batch_statistics="exact" takes a list as one batch, of one dtype: got {", ".join(map(str, dtypes))}. '
                "Convert them first"
            )
    counts = [image.shape[0] for image in images]
    result = network(*(torch.cat(list(of_each)) for of_each in (images, *maps)), gather=gather)

    def part(k: int, leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.shape[:1] == (sum(counts),)
        return leaf.split(counts)[k] if batched else leaf

    return [pytree.tree_map(lambda leaf, k=k: part(k, leaf), result) for k in range(len(counts))]
