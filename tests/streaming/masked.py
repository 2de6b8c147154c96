"""The definition of a mask in plain PyTorch: the network on the whole image, its reductions over the foreground.

`masked(model, image, mask, fill)` is what `stream(model)(image, mask=mask, fill=fill)` must give.
"""

from inspect import BoundArguments, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree


def foreground(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The foreground of a map of this size: (N or 1, 1, height, width) of bool, from a mask (N or 1, rows, columns)."""
    return F.adaptive_max_pool2d(mask[:, None].double(), size) > 0


def masked(model: nn.Module, image: Tensor, mask: Tensor, fill: float = 0.0) -> Any:
    """The model on the image with `fill` in the background, reductions over the foreground, maps zero outside of it."""
    image = torch.where(foreground(mask, image.shape[-2:]), image, fill)
    with OverForeground(mask):
        result = model(image)
    return pytree.tree_map(lambda x: torch.where(foreground(mask, x.shape[-2:]), x, 0) if x.ndim == 4 else x, result)


class OverForeground(TorchFunctionMode):
    """Within it, operations over all positions of maps, (N, C, H, W) or flattened to (N, C, H * W), leave out the background."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask
        self.sizes: dict[int, tuple[int, int]] = {}  # of flattened maps, by the number of positions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if not isinstance(x, Tensor) or x.ndim not in (3, 4):
            return func(*args, **kwargs)
        if x.ndim == 4:
            self.sizes[x.shape[2] * x.shape[3]] = (x.shape[2], x.shape[3])
        mask = self._mask(x)
        if mask is None:
            return func(*args, **kwargs)
        space = tuple(range(2, x.ndim))
        name = getattr(func, "__name__", "")
        if name == "adaptive_avg_pool2d":
            over = F.adaptive_avg_pool2d
            share = over(mask.to(x.dtype), args[1])
            return torch.where(share > 0, over(torch.where(mask, x, 0), args[1]) / torch.where(share > 0, share, 1), 0)
        if name == "adaptive_max_pool2d":
            best = F.adaptive_max_pool2d(torch.where(mask, x, -torch.inf), args[1])
            return torch.where(best == -torch.inf, 0, best)
        if name in ("mean", "sum", "amax", "amin", "logsumexp", "var"):
            dims = args[1] if len(args) > 1 else kwargs.get("dim")
            dims = tuple(d % x.ndim for d in ([dims] if isinstance(dims, int) else dims))
            assert set(space) <= set(dims)
            return self._reduced(name, x, mask.expand_as(x), dims, bool(kwargs.get("keepdim", False)))
        if name in ("softmax", "log_softmax") and (args[1] if len(args) > 1 else kwargs["dim"]) % x.ndim in space:
            return func(torch.where(mask, x, -torch.inf), *args[1:], **kwargs)
        if name in ("matmul", "__matmul__") and x.ndim == 3:  # over positions, which stand last
            return func(torch.where(mask, x, 0), *args[1:], **kwargs)
        if name == "normalize":
            return x / torch.where(mask, x, 0).norm(dim=kwargs["dim"], keepdim=True).clamp_min(1e-12)
        if name in ("group_norm", "instance_norm", "batch_norm"):
            return self._normalised(name, x, mask.expand_as(x), func, signature(func).bind(*args, **kwargs))
        return func(*args, **kwargs)

    def _mask(self, x: Tensor) -> Tensor | None:
        if x.ndim == 4:
            return foreground(self.mask, (x.shape[2], x.shape[3]))
        size = self.sizes.get(x.shape[2])
        return None if size is None else foreground(self.mask, size).flatten(2)

    def _reduced(self, name: str, x: Tensor, mask: Tensor, dims: tuple[int, ...], keep: bool) -> Tensor:
        if name == "amax":
            return torch.where(mask, x, -torch.inf).amax(dims, keepdim=keep)
        if name == "amin":
            return torch.where(mask, x, torch.inf).amin(dims, keepdim=keep)
        if name == "logsumexp":
            return torch.where(mask, x, -torch.inf).logsumexp(dims, keepdim=keep)
        total = torch.where(mask, x, 0).sum(dims, keepdim=keep)
        if name == "sum":
            return total
        count = mask.sum(dims, keepdim=keep)
        if name == "mean":
            return total / count
        mean = torch.where(mask, x, 0).sum(dims, keepdim=True) / mask.sum(dims, keepdim=True)
        return torch.where(mask, (x - mean) ** 2, 0).sum(dims, keepdim=keep) / (count - 1)

    def _normalised(self, name: str, x: Tensor, mask: Tensor, func: Any, bound: BoundArguments) -> Tensor:
        bound.apply_defaults()
        given = bound.arguments
        if not given.get("training", True) or not given.get("use_input_stats", True):
            return func(*bound.args, **bound.kwargs)
        dims = (0, 2, 3) if name == "batch_norm" else (2, 3)
        if name == "group_norm":
            x_, mask_, dims = (*(t.reshape(len(x), given["num_groups"], -1) for t in (x, mask)), (2,))
        else:
            x_, mask_ = x, mask
        count = mask_.sum(dims, keepdim=True)
        mean = torch.where(mask_, x_, 0).sum(dims, keepdim=True) / count
        var = torch.where(mask_, (x_ - mean) ** 2, 0).sum(dims, keepdim=True) / count
        result = ((x_ - mean) / (var + given["eps"]).sqrt()).reshape(x.shape)
        weight, bias = (None if given[key] is None else given[key].reshape(1, -1, 1, 1) for key in ("weight", "bias"))
        return (result if weight is None else result * weight) + (0 if bias is None else bias)
