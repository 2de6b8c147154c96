"""The mean of what a mask selects."""

import torch
from torch import Tensor


def masked_mean(loss: Tensor, mask: Tensor | None) -> Tensor:
    """The sum of the losses under `mask`, divided by the sum of `mask`; 0 where it selects nothing.

    Computed in 32 bits at least, for sums of many patches leave the range of 16.

    Args:
        loss: One per element.
        mask: 1 (or True) where a loss counts and 0 elsewhere, of a shape that broadcasts to that of the losses; None is their mean.
    """
    if mask is None:
        return loss.mean()
    mask = mask.to(torch.promote_types(loss.dtype, torch.float32))
    return (loss * mask).sum() / mask.sum().clamp(min=torch.finfo(mask.dtype).tiny)
