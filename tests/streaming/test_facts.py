"""What is declared of an operation, is what PyTorch does: autograd keeps for its derivative what its rule says that it saves."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from widefield.streaming.rules.base import OPS, op_of

aten = torch.ops.aten
X = torch.rand(2, 4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.6 + 0.2
WEIGHT, SCALE = torch.rand(4, 4, 3, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64)

ELEMENTWISE_LOSSES = (
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "hinge_embedding_loss", "kl_div"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
)
TRANSFORMS = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft", "fftshift", "ifftshift")
CALLS: dict[str, Callable[[Tensor], object]] = {
    "conv2d": lambda x: F.conv2d(x, WEIGHT),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, WEIGHT),
    "linear": lambda x: F.linear(x, torch.rand(3, 5, dtype=torch.float64).requires_grad_()),
    "matmul": lambda x: x @ torch.rand(5, 3, dtype=torch.float64).requires_grad_(),
    "bmm": lambda x: torch.bmm(x.view(8, 6, 5), torch.rand(8, 5, 3, dtype=torch.float64).requires_grad_()),
    "einsum": lambda x: torch.einsum("nchw,cd->ndhw", x, torch.rand(4, 3, dtype=torch.float64).requires_grad_()),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d_with_indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "max_unpool2d": lambda x: x.flatten(2).scatter(
        2, torch.arange(30).expand(2, 4, 30), x.flatten(2)
    ),  # as the rule does
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "batch_norm": lambda x: F.batch_norm(x, SCALE, SCALE, SCALE),
    "_native_batch_norm_legit_no_training": lambda x: F.batch_norm(x, SCALE, SCALE, SCALE),
    "instance_norm": lambda x: F.instance_norm(x),
    "layer_norm": lambda x: F.layer_norm(x, (5,)),
    "native_layer_norm": lambda x: aten.native_layer_norm(x, [5], None, None, 1e-5)[0],
    "rms_norm": lambda x: F.rms_norm(x, (5,)),
    "prelu": lambda x: F.prelu(x, SCALE),
    "_prelu_kernel": lambda x: F.prelu(x, SCALE),
    "dropout": lambda x: F.dropout(x, 0.5),
    "native_dropout": lambda x: F.dropout(x, 0.5),
    "softmax": lambda x: x.softmax(1),
    "_softmax": lambda x: aten._softmax(x, 1, False),
    "_safe_softmax": lambda x: aten._safe_softmax(x, 1),
    "log_softmax": lambda x: x.log_softmax(1),
    "_log_softmax": lambda x: aten._log_softmax(x, 1, False),
    "cumsum": lambda x: x.cumsum(1),
    "cumprod": lambda x: x.cumprod(1),
    "glu": lambda x: F.glu(x, 1),
    "topk": lambda x: x.topk(2, 1)[0],
    "cummax": lambda x: x.cummax(1)[0],
    "cummin": lambda x: x.cummin(1)[0],
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "median": lambda x: x.median(1)[0],
    "nanmedian": lambda x: x.nanmedian(1)[0],
    "kthvalue": lambda x: x.kthvalue(2, 1)[0],
    "mode": lambda x: x.mode(1)[0],
    "nansum": lambda x: x.nansum(1),
    "aminmax": lambda x: torch.aminmax(x, dim=1)[0],
    "scatter": lambda x: x.scatter(1, torch.zeros(2, 1, 6, 5, dtype=torch.int64), x),
    "scatter_add": lambda x: x.scatter_add(1, torch.zeros(2, 1, 6, 5, dtype=torch.int64), x),
    "grid_sampler": lambda x: F.grid_sample(x, torch.rand(2, 6, 5, 2, dtype=x.dtype), align_corners=False),
    "linalg_cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 1:], dim=1),
    "tril": torch.tril,
    "triu": torch.triu,
    "conv3d": lambda x: F.conv3d(x[:, None], WEIGHT[:, :1, None]),
    "gather": lambda x: x.gather(1, torch.zeros(2, 1, 6, 5, dtype=torch.int64)),
    "avg_pool3d": lambda x: F.avg_pool3d(x, (3, 1, 1), 1),
    "repeat_interleave": lambda x: aten.repeat_interleave.self_int(x, 2, 1),
    "sort": lambda x: x.sort(1)[0],
    "mean": lambda x: x.mean(1),
    "sum": lambda x: x.sum(1),
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin(1),
    "prod": lambda x: x.prod(1),
    "var": lambda x: x.var(1),
    "std": lambda x: x.std(1),
    "var_mean": lambda x: torch.var_mean(x, 1),
    "std_mean": lambda x: torch.std_mean(x, 1),
    "logsumexp": lambda x: x.logsumexp(1),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, 2, 1),
    "norm": lambda x: aten.norm(x, 2, [1]),
    "max": lambda x: x.max(1)[0],
    "min": lambda x: x.min(1)[0],
    "add": lambda x: x + x,
    "leaky_relu": F.leaky_relu,
    "sub": lambda x: x - 1,
    "rsub": lambda x: 1 - x,
    "square": torch.square,
    "hardswish": F.hardswish,
    "log_sigmoid": F.logsigmoid,
    "special_expm1": torch.special.expm1,
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "native_channel_shuffle": lambda x: aten.native_channel_shuffle(x, 2),
    "where": lambda x: torch.where(x > 0.5, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.0),
    "clone": torch.clone,
    "to": lambda x: x.to(torch.float32),
    "_to_copy": lambda x: x.float(),
    "detach": lambda x: x.detach(),
    "cat": lambda x: torch.cat([x, x], 1),
    "stack": lambda x: torch.stack([x, x], 1),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:, :2], 1, 0, 2),
    "select_scatter": lambda x: torch.select_scatter(x, x[:, 0], 1, 0),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 2])),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "pad": lambda x: F.pad(x, (1, 1)),
    "constant_pad_nd": lambda x: F.pad(x, (1, 1)),
    "reflection_pad2d": lambda x: x.index_select(3, torch.tensor([1, 0, 1])),  # so the rule computes it
    "replication_pad2d": lambda x: x.index_select(3, torch.tensor([0, 0, 1])),
    "upsample_nearest2d": lambda x: F.interpolate(x, scale_factor=2),
    "_upsample_nearest_exact2d": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "upsample_bilinear2d": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "_upsample_bilinear2d_aa": lambda x: F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True),
    "_upsample_bicubic2d_aa": lambda x: F.interpolate(x, size=(4, 4), mode="bicubic", antialias=True),
    "upsample_bicubic2d": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    **{name: lambda x, name=name: getattr(F, name)(x, x.detach(), reduction="none") for name in ELEMENTWISE_LOSSES},
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[..., :4], 2),
    "complex": lambda x: torch.complex(x, x),
    "polar": lambda x: torch.polar(x, x),
    **{f"fft_{name}": lambda x, name=name: getattr(torch.fft, name)(x, dim=1) for name in TRANSFORMS},
    **{
        f"fft_{kind}{n}": lambda x, name=f"{kind}{n}": getattr(torch.fft, name)(x, dim=(0, 1))
        for kind in ("fft", "ifft", "rfft", "irfft")
        for n in "2n"
    },
}
# Views save nothing themselves: what reads them decides. The others have no derivative, or are forms of those above.
VIEWS = frozenset(
    (
        *("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "unflatten", "flatten", "view_as", "reshape_as"),
        *("permute", "transpose", "movedim", "swapaxes", "swapdims", "expand", "slice", "select", "unbind", "alias"),
        *("split", "split_with_sizes", "chunk", "tensor_split", "narrow", "unfold", "contiguous", "type_as"),
        *("view_as_real", "view_as_complex", "_conj", "_neg_view", "resolve_conj", "resolve_neg"),
    )
)
WITHOUT_DERIVATIVE = frozenset(
    (
        *("argmax", "argmin", "argsort", "any", "all", "bernoulli", "floor_divide", "fill", "one_hot"),
        *("count_nonzero", "searchsorted", "bucketize", "embedding"),
        *("__and__", "__or__", "__xor__"),
        *("zeros_like", "ones_like", "full_like", "empty_like"),
    )
)


def saved_by(call: Callable[[Tensor], object]) -> set[str]:
    """What autograd keeps of the input `X`, of the result, and besides."""
    x, saved = X.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        results = [t for t in pytree.tree_leaves(call(x)) if isinstance(t, Tensor)]
    kinds = set()
    for tensor in saved:
        memory = tensor.untyped_storage().data_ptr()
        if memory == x.untyped_storage().data_ptr():
            kinds.add("inputs")
        elif any(memory == t.untyped_storage().data_ptr() for t in results):
            kinds.add("indices" if tensor.dtype == torch.int64 else "result")
        elif tensor.dtype == torch.int64 and tensor.numel() == results[0].numel():
            kinds.add("indices")
        elif tensor.dtype in (torch.bool, X.dtype) and tensor.shape == results[0].shape:
            kinds.add("mask")
    return kinds


def unary() -> Iterator[str]:
    """Operators of one tensor and nothing else that PyTorch tags as pointwise, and that differentiate real numbers."""
    for name in dir(aten):
        packet = getattr(aten, name)
        if not isinstance(packet, torch._ops.OpOverloadPacket) or "default" not in packet.overloads():
            continue
        op = packet.default
        if torch.Tag.pointwise not in op.tags or torch.Tag.nondeterministic_seeded in op.tags:
            continue
        if op._schema.is_mutable or name.endswith("_backward"):
            continue
        if [str(argument.type) for argument in op._schema.arguments if not argument.has_default_value()] == ["Tensor"]:
            with contextlib.suppress(NotImplementedError, RuntimeError):
                packet(X.clone().requires_grad_())
                yield name


@pytest.mark.parametrize("name", [*CALLS, *(name for name in unary() if name not in CALLS)])
def test_what_autograd_saves_is_declared(name: str) -> None:
    packet = getattr(aten, name)
    op = op_of(getattr(packet, packet.overloads()[0]))
    assert op is not None
    saved = saved_by(CALLS.get(name, packet))
    if saved == {"mask"} and "inputs" in op.saves:  # a condition or a sign, which is smaller than an input
        return
    assert saved <= op.saves, f"declared: {sorted(op.saves)}"
    if "inputs" not in op.saves:
        assert saved == op.saves


@pytest.mark.parametrize("name", CALLS)
def test_what_is_declared_of_results_is_so(name: str) -> None:
    packet = getattr(aten, name)
    op = op_of(getattr(packet, packet.overloads()[0]))
    assert op is not None
    x = X.clone().requires_grad_()
    result, again = (pytree.tree_leaves(CALLS[name](x))[0] for _ in range(2))
    assert result.requires_grad != op.stops_gradients
    if op.carries_relu:  # so writing over it changes neither what was read nor the derivative
        assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert "result" not in saved_by(CALLS[name])
    if op.draws:
        assert not torch.equal(result, again)
    if op.sends_same:
        gradient = torch.rand_like(result)
        operands = [torch.rand_like(result).requires_grad_() for _ in range(2)]
        assert all(torch.equal(g, gradient) for g in torch.autograd.grad(packet(*operands), operands, gradient))


def test_every_registered_operation_is_looked_at() -> None:
    placed = [target for target, op in OPS.items() if op.rule and isinstance(target, torch._ops.OpOverload)]
    names = {target._schema.name.removeprefix("aten::") for target in placed}
    assert names - CALLS.keys() - VIEWS - WITHOUT_DERIVATIVE - set(unary()) == set()
