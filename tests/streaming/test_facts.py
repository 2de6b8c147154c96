"""Every operation that is registered: what is declared of it is what PyTorch does, and streamed it is as on the whole map.

A new operation gets one line, in `CALLS`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.streaming.exactness import assert_exact
from widefield.streaming.rules.base import OPS, Op, op_of

aten = torch.ops.aten
X = torch.rand(2, 4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.6 + 0.2
WEIGHT, SCALE = torch.rand(4, 4, 3, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64)


class Call(nn.Module):
    """A function of a map and, if there is a `shape`, of a parameter."""

    def __init__(self, function: Callable[..., object], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([torch.rand(shape, dtype=torch.float64)] if shape else [])

    def forward(self, x: Tensor) -> object:
        return self.function(x, *self.weights)


ELEMENTWISE_LOSSES = (
    *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss", "hinge_embedding_loss", "kl_div"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
)
TRANSFORMS = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft", "fftshift", "ifftshift")
# An example of each operation, by its name in `torch.ops.aten`: on a map of four channels and any size, of numbers from 0.2 to 0.8.
CALLS: dict[str, Callable[[Tensor], object]] = {
    "conv2d": lambda x: F.conv2d(x, WEIGHT),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, WEIGHT),
    "linear": Call(lambda x, w: F.linear(x.movedim(1, -1), w), 3, 4),
    "matmul": Call(lambda x, w: w @ x.flatten(2), 3, 4),
    "bmm": Call(lambda x, w: torch.bmm(x.flatten(2).mT, w), 2, 4, 3),
    "einsum": Call(lambda x, w: torch.einsum("nchw,cd->ndhw", x, w), 4, 3),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "max_pool2d_with_indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "max_unpool2d": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2, output_size=x.shape[2:]),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "batch_norm": lambda x: F.batch_norm(x, SCALE, SCALE, SCALE),
    "_native_batch_norm_legit_no_training": lambda x: F.batch_norm(x, SCALE, SCALE, SCALE),
    "instance_norm": lambda x: F.instance_norm(x),
    "layer_norm": lambda x: F.layer_norm(x.movedim(1, -1), (4,)),
    "native_layer_norm": lambda x: aten.native_layer_norm(x.movedim(1, -1), [4], None, None, 1e-5)[0],
    "rms_norm": lambda x: F.rms_norm(x.movedim(1, -1), (4,)),
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
    "scatter": lambda x: x.scatter(1, x.detach().argsort(1)[:, :1], x[:, 1:2]),
    "scatter_add": lambda x: x.scatter_add(1, x.detach().argsort(1)[:, :1], x[:, 1:2]),
    "grid_sampler": lambda x: F.grid_sample(
        x, F.affine_grid(torch.eye(2, 3).to(x).expand(2, 2, 3), x.shape, False), align_corners=False
    ),
    "linalg_cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 1:], dim=1),
    "tril": lambda x: x.movedim(1, -1).unflatten(-1, (2, 2)).tril(),
    "triu": lambda x: x.movedim(1, -1).unflatten(-1, (2, 2)).triu(),
    "conv3d": lambda x: F.conv3d(x[:, None], WEIGHT[:, :1, None]),
    "gather": lambda x: x.gather(1, x.detach().argsort(1)[:, :1]),
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
    "mul": lambda x: x * x,
    "div": lambda x: x / x[:, :1],
    "clamp": lambda x: x.clamp(0.4, 0.6),
    "clamp_min": lambda x: x.clamp_min(0.4),
    "clamp_max": lambda x: x.clamp_max(0.6),
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
    "pad": lambda x: F.pad(x, (1, 2, 3, 0)),
    "constant_pad_nd": lambda x: F.pad(x, (1, 1)),
    "reflection_pad2d": lambda x: F.pad(x, (4, 3, 5, 2), mode="reflect"),
    "replication_pad2d": lambda x: F.pad(x, (4, 3, 5, 2), mode="replicate"),
    "upsample_nearest2d": lambda x: F.interpolate(x, scale_factor=2),
    "_upsample_nearest_exact2d": lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "upsample_bilinear2d": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "_upsample_bilinear2d_aa": lambda x: F.interpolate(x, size=(4, 4), mode="bilinear", antialias=True),
    "_upsample_bicubic2d_aa": lambda x: F.interpolate(x, size=(4, 4), mode="bicubic", antialias=True),
    "upsample_bicubic2d": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    **{name: lambda x, name=name: getattr(F, name)(x, x.detach(), reduction="none") for name in ELEMENTWISE_LOSSES},
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x[..., :4, :4], 2),
    "complex": lambda x: torch.complex(x, x),
    "polar": lambda x: torch.polar(x, x),
    **{f"fft_{name}": lambda x, name=name: getattr(torch.fft, name)(x, dim=1) for name in TRANSFORMS},
    **{
        f"fft_{kind}{n}": lambda x, name=f"{kind}{n}": getattr(torch.fft, name)(x, dim=(0, 1))
        for kind in ("fft", "ifft", "rfft", "irfft")
        for n in "2n"
    },
    # Views.
    "view": lambda x: x.view(len(x), 2, 2, *x.shape[2:]),
    "reshape": lambda x: x.mT.reshape(len(x), 2, 2, x.shape[3], x.shape[2]),
    "_unsafe_view": lambda x: aten._unsafe_view(x, [len(x), 2, 2, *x.shape[2:]]),
    "view_as": lambda x: x.view_as(x.detach()[:, :, None]),
    "reshape_as": lambda x: x.reshape_as(x.detach()[:, None]),
    "unsqueeze": lambda x: x.unsqueeze(2),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "flatten": lambda x: x.flatten(0, 1),
    "permute": lambda x: x.permute(2, 0, 3, 1),
    "transpose": lambda x: x.transpose(0, 3),
    "movedim": lambda x: x.movedim(1, -1),
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "swapdims": lambda x: x.swapdims(1, 2),
    "expand": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "slice": lambda x: x[:, :, 1::2, :-2],
    "select": lambda x: x.select(1, 2),
    "unbind": lambda x: x.unbind(1)[2],
    "split": lambda x: x.split(3, 1)[1],
    "split_with_sizes": lambda x: x.split_with_sizes([1, 3], 1)[1],
    "chunk": lambda x: x.chunk(2, 1)[1],
    "tensor_split": lambda x: x.tensor_split(3, 1)[0],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "unfold": lambda x: x.unfold(2, 3, 2),
    "alias": lambda x: aten.alias(x),
    "contiguous": lambda x: x.mT.contiguous(),
    "type_as": lambda x: x.type_as(x.detach().float()),
    "view_as_real": lambda x: torch.view_as_real(torch.complex(x, x)),
    "view_as_complex": lambda x: torch.view_as_complex(torch.stack([x, x], -1)),
    "_conj": lambda x: x.to(torch.complex128).conj(),
    "_neg_view": lambda x: x.to(torch.complex128).conj().imag,
    "resolve_conj": lambda x: x.to(torch.complex128).conj().resolve_conj(),
    "resolve_neg": lambda x: x.to(torch.complex128).conj().imag.resolve_neg(),
    # Without a derivative.
    "argmax": lambda x: x.argmax(1),
    "argmin": lambda x: x.argmin(1),
    "argsort": lambda x: x.detach().argsort(1),
    "any": lambda x: (x > 0.6).any(1),
    "all": lambda x: (x > 0.4).all(1),
    "count_nonzero": lambda x: (x > 0.5).count_nonzero(1),
    "bernoulli": lambda x: aten.bernoulli.p(x, 0.5),
    "floor_divide": lambda x: x // 0.1,
    "fill": lambda x: aten.fill(x, 0.5),
    "one_hot": lambda x: F.one_hot((4 * x.detach()).long(), 4),
    "searchsorted": lambda x: torch.searchsorted(SCALE.sort()[0], x.detach()),
    "bucketize": lambda x: torch.bucketize(x.detach(), SCALE.sort()[0]),
    "embedding": Call(lambda x, w: F.embedding((4 * x[:, 0].detach()).long(), w), 4, 5),
    "__and__": lambda x: (x > 0.4) & (x < 0.6),
    "__or__": lambda x: (x < 0.4) | (x > 0.6),
    "__xor__": lambda x: (x > 0.4) ^ (x > 0.6),
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "full_like": lambda x: torch.full_like(x, 0.3),
    "empty_like": lambda x: torch.empty_like(x).fill_(0.3),
}
NO_BACKWARD = ("floor_divide", "native_channel_shuffle")  # PyTorch has none, or none by this name
# Of these the rule computes the same in another way, whose derivative saves something else.
AS_IN_THE_RULE: dict[str, Callable[[Tensor], object]] = {
    "max_unpool2d": lambda x: x.flatten(2).scatter(2, torch.arange(30).expand(2, 4, 30), x.flatten(2)),
    "reflection_pad2d": lambda x: x.index_select(3, torch.tensor([1, 0, 1])),
    "replication_pad2d": lambda x: x.index_select(3, torch.tensor([0, 0, 1])),
}


def op_named(name: str) -> Op:
    """The facts about `torch.ops.aten.NAME`."""
    packet = getattr(aten, name)
    return next(op for overload in packet.overloads() if (op := op_of(getattr(packet, overload))) is not None)


EXACT = [name for name in CALLS if not op_named(name).draws]


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
    op = op_named(name)
    saved = saved_by(AS_IN_THE_RULE.get(name, CALLS.get(name, getattr(aten, name))))
    if saved == {"mask"} and "inputs" in op.saves:  # a condition or a sign, which is smaller than an input
        return
    assert saved <= op.saves, f"declared: {sorted(op.saves)}"
    if "inputs" not in op.saves:
        assert saved == op.saves


@pytest.mark.parametrize("name", CALLS)
def test_what_is_declared_of_results_is_so(name: str) -> None:
    op = op_named(name)
    x = X.clone().requires_grad_()
    result, again = (pytree.tree_leaves(CALLS[name](x))[0] for _ in range(2))
    if result.is_floating_point() or result.is_complex():
        assert result.requires_grad != op.stops_gradients
    if op.carries_relu:  # so writing over it changes neither what was read nor the derivative
        assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert "result" not in saved_by(CALLS[name])
    if op.keeps_batch and len(result) == len(x):
        torch.testing.assert_close(pytree.tree_leaves(CALLS[name](x[1:]))[0], result[1:])
    if op.exact:  # not rounded, so that it is the same in any precision
        assert torch.equal(pytree.tree_leaves(CALLS[name](x.float()))[0].double(), CALLS[name](x.float().double()))
    if op.draws:
        assert not torch.equal(result, again)
    if op.sends_same:
        gradient = torch.rand_like(result)
        operands = [torch.rand_like(result).requires_grad_() for _ in range(2)]
        assert all(
            torch.equal(g, gradient) for g in torch.autograd.grad(getattr(aten, name)(*operands), operands, gradient)
        )


class Network(nn.Module):
    """Operations after a convolution whose result lies from 0.2 to 0.8."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.before, self.names = nn.Conv2d(3, 4, 3, padding=1), names
        self.calls = nn.ModuleList(call if isinstance(call, Call) else Call(call) for call in map(CALLS.get, names))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.before(x).sigmoid() * 0.6 + 0.2
        given = [x.detach() if name in NO_BACKWARD else x for name in self.names]
        made = pytree.tree_leaves([call(x) for call, x in zip(self.calls, given, strict=True)])
        return [torch.view_as_real(y.resolve_conj()) if y.is_complex() else y for y in made]


GROUPS = {f"{EXACT[k]} and on": EXACT[k : k + 24] for k in range(0, len(EXACT), 24)}


@pytest.mark.parametrize("names", GROUPS.values(), ids=GROUPS)
def test_streamed_operations_are_exact(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("widefield.streaming.capture._SYMBOLIC_LIMIT", 0.0)  # a trace for all sizes takes longer
    torch.manual_seed(0)
    image = torch.randn(2, 3, 11, 8)
    try:
        assert_exact(Network(names), image, [(4, 3), (1, None)])
    except Exception:
        for name in names:  # a capture takes longest, so that they have one in common; which of them fails, shows alone
            assert_exact(Network([name]), image, [(4, 3)])
        raise


def test_every_registered_operation_is_looked_at() -> None:
    placed = [target for target, op in OPS.items() if op.rule and isinstance(target, torch._ops.OpOverload)]
    names = {target._schema.name.removeprefix("aten::") for target in placed}
    assert names - CALLS.keys() - set(unary()) == set()
