"""A copy of a module's structure without values, on which its forward is captured."""

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils import _pytree as pytree

from widefield.streaming.captured import CAPTURE_DEVICE
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.fingerprint import NOTHING, before_forward
from widefield.streaming.watch import mark_computed


def skeleton_of(module: nn.Module, fake: FakeTensorMode, batch_statistics: bool) -> nn.Module:
    """Return a copy of the module's structure with tensors that have no storage, norm layers with running statistics in eval mode.

    With `batch_statistics`, batch norm layers in training mode are copied without running statistics.
    """
    memo: dict[int, Any] = {}

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        with fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CAPTURE_DEVICE)

    own_parameters = set(map(id, module.parameters()))  # any tensors in torch.func.functional_call
    for tensor in (*module.parameters(), *module.buffers()):
        parameter = isinstance(tensor, nn.Parameter) or id(tensor) in own_parameters
        memo[id(tensor)] = nn.Parameter(empty(tensor), tensor.requires_grad) if parameter else empty(tensor)
    for part in module.modules():
        own = list(part.__dict__.values())
        for value in pytree.tree_leaves([*own, *map(before_forward, own)]):
            computed = (
                isinstance(value, torch.Tensor) and value.grad_fn is not None
            )  # results, pruned weights among them
            if computed and id(value) not in own_parameters:
                memo[id(value)] = mark_computed(empty(value))
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # iterators will not always be copied
        skeleton = copied(module, memo)
    for original, part in zip(module.modules(), skeleton.modules(), strict=True):
        for key, value in original.__dict__.items():
            if (before := before_forward(value)) is NOTHING:
                del part.__dict__[key]
            elif before is not value:
                part.__dict__[key] = copy.deepcopy(before, memo)
        if not isinstance(part, _NormBase) or not part.track_running_stats:
            continue
        if batch_statistics and part.training and isinstance(part, _BatchNorm):
            part.running_mean = part.running_var = part.num_batches_tracked = None
            part.track_running_stats = False
        else:
            part.training = False
        if isinstance(part, nn.SyncBatchNorm):  # it computes the same, and synchronises what is not computed here
            part.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    return skeleton


def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy by way of `memo`, which shares what cannot be copied: locks, files, modules of Python, and what holds them."""
    shared = dict(memo)
    try:
        return copy.deepcopy(module, memo)
    except Exception:
        layers = {id(part): part for part in module.modules()}
        for leaf in pytree.tree_leaves([vars(part) for part in module.modules()]):
            try:
                copy.deepcopy(leaf, {**layers, **shared})
            except Exception:
                shared[id(leaf)] = leaf
    memo.clear()
    memo.update(shared)
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        reason = f"cannot be captured, because the model cannot be copied ({type(error).__name__}: {error!s:.200})"
        remedy = "let copy.deepcopy(model) work, or stream only a part of the model for which it does"
        raise UnsupportedOpError("", "forward", reason, remedy) from error
