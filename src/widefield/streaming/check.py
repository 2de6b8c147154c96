"""Is a model streamed exactly? Compare it with plain PyTorch on a small image, and look at its plan for a large one.

The reference is the model in evaluation mode: norm layers with running statistics use them, random layers are off. Compared are
all outputs, with gradients enabled and without, the image's gradient and every parameter's gradient, for a random weighting of all
outputs that require grad.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from widefield.streaming.build import explain as explain_passes
from widefield.streaming.capture import device_of, trace_module
from widefield.streaming.captured import CallKind
from widefield.streaming.comparison import Outcome, contiguous_gradient, differences, outcome
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.module import StreamingCNN, stream
from widefield.streaming.plan import Plan
from widefield.streaming.rules.base import OPS
from widefield.streaming.skeleton import copied
from widefield.streaming.verification import TOLERANCES

TOLERANCE = 1e-10  # relative, in float64: what the same numbers summed in another order stay far below
# In a model that amplifies rounding (deep, with random weights) they do not. Then this times what plain PyTorch's own results
# change by, when its image and weights change by one unit in the last place, is tolerated: every layer rounds, not only these.
_OF_ROUNDING = 100
_MOST_ROUNDING = 1e-6  # and never more than this: a model whose forward draws numbers differs from itself
ENOUGH = 0.95  # share of the activation bytes that has to be streamed
# A gradient that is 0 but for rounding (of a bias before a norm layer) is compared with this share of the largest gradient.
_FLOOR = 1e-4

Verdict = Literal["exact", "exact with stages", "exact trunk, rest whole", "partly", "refused", "WRONG"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
EXACT: tuple[Verdict, ...] = ("exact", "exact with stages", "exact trunk, rest whole")

_MEANING: dict[Verdict, str] = {
    "exact": "outputs and all gradients are those of the whole image",
    "exact with stages": "outputs and all gradients are those of the whole image",
    "exact trunk, rest whole": "all that comes before the first operation on tokens is streamed exactly, the rest runs whole",
    "partly": "results are exact, but a part of the model runs on whole maps",
    "refused": "it cannot be streamed",
    "WRONG": "streamed results differ from those of the whole image; please report this as a bug",
}


@dataclass(frozen=True)
class Check:
    """Findings of `check` about a model.

    `errors` holds the largest relative error of the "outputs", of the "outputs without gradients" (inference), of the "image
    gradient" and of the "parameter gradients", which is that of `worst_parameter`; it is empty when nothing could be streamed.
    `image_shape` (N, C, H, W) and `tile_size` are those of the comparison, as are `stages` (the number of scans) and
    `streamed_fraction` (of the activation bytes). `refused` are the operations that run whole. `rounding`, looked at where
    errors are above `TOLERANCE`, holds by how much the plain results change when image and weights change by a unit in the last
    place. `plan` is that of a large image, or None; then `no_plan` says why.
    """

    verdict: Verdict
    image_shape: tuple[int, ...]
    tile_size: tuple[int, int]
    errors: Mapping[str, float]
    worst_parameter: str = ""
    stages: int = 0
    streamed_fraction: float = 0.0
    refused: tuple[UnsupportedOpError, ...] = ()
    plan: Plan | None = None
    no_plan: str = ""
    rounding: Mapping[str, float] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """True if the verdict is one of `EXACT`."""
        return self.verdict in EXACT

    @property
    def worst_error(self) -> float | None:
        """The largest of `errors`."""
        return max(self.errors.values(), default=None)

    @property
    def summary(self) -> str:
        """One line: the verdict, stages, streamed share and error."""
        line = f"{self.verdict}: {_MEANING[self.verdict]}"
        if self.worst_error is None:
            return line
        stages = "1 stage" if self.stages == 1 else f"{self.stages} stages"
        share = f"{self.streamed_fraction:.1%} of the activation bytes streamed"
        return f"{line} ({stages}, {share}, largest relative error {self.worst_error:.1e})"

    def __str__(self) -> str:
        size = " x ".join(map(str, self.image_shape))
        lines = [self.summary, "", f"compared on a random image of {size} in float64, tiles of {self.tile_size}:"]
        lines += [f"  {what:<27}{error:.1e}" for what, error in self.errors.items()] or ["  nothing, see below"]
        if self.rounding:
            lines.append(
                "the plain result itself changes, when image and weights change by a unit in the last place, by:"
            )
            lines += [f"  {what:<27}{error:.1e}" for what, error in self.rounding.items()]
        if self.worst_parameter and self.verdict == "WRONG":
            lines.append(f"  worst parameter            {self.worst_parameter}")
        if self.plan:
            lines += ["", "plan for a large image, in the model's own dtype:"]
            lines += [f"  {line}" for line in self.plan.summary.splitlines()]
        elif self.no_plan:
            lines += ["", f"no plan for a large image: {self.no_plan}"]
        if self.refused:
            lines += ["", "what stands in the way:"]
            lines += [f"  {line}" for text in dict.fromkeys(map(str, self.refused)) for line in text.splitlines()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        plan = self.plan
        return {
            "verdict": self.verdict,
            "exact": self.exact,
            "image_shape": list(self.image_shape),
            "tile_size": list(self.tile_size),
            "errors": dict(self.errors),
            "worst_parameter": self.worst_parameter,
            "rounding": dict(self.rounding),
            "stages": self.stages,
            "streamed_fraction": self.streamed_fraction,
            "refused": [
                {key: getattr(error, key) for key in ("module_path", "op", "reason", "remedy", "source")}
                for error in self.refused
            ],
            "plan": plan and plan.as_dict(),
            "no_plan": self.no_plan,
        }


def check(
    model: nn.Module,
    shape: Sequence[int] = (3, 97, 113),
    tile_size: int | tuple[int, int | None] | None = None,
    *,
    plan_shape: Sequence[int] | None = (3, 8192, 8192),
    plan_tile_size: int | tuple[int, int | None] | None = None,
    memory_budget: int | str | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Check:
    """Compare `stream(model)` with `model` on a random image of `shape`; the model itself is left as it is.

    Args:
        model: any module that maps images (N, C, H, W) to tensors, or to lists, tuples and dicts of them.
        shape: (channels, height, width) of the image compared, or (N, channels, height, width).
        tile_size: pixels per step in the comparison; by default a third of the height and of the width.
        plan_shape: an image size to plan for, without computing a pixel; None: no plan.
        plan_tile_size: pixels per step of that plan; by default what `memory_budget` allows.
        memory_budget: bytes, or text such as "2GiB", for that plan.
        dtype: what the comparison is computed in. Casts to float32 inside of the model are raised to it.
        seed: of the image and of the weighting of the outputs.

    Raises:
        ValueError: the plain model cannot run on an image of this shape, or gives infinities.
    """
    if len(shape) not in (3, 4) or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"shape={tuple(shape)} must be (channels, height, width) of positive ints")
    full = (1,) * (4 - len(shape)) + tuple(shape)
    tile_size = tile_size if tile_size is not None else (-(-full[2] // 3), -(-full[3] // 3))
    generator = torch.Generator("cpu").manual_seed(seed)
    image = torch.randn(full, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    image = image.to(device_of(model))

    plain = _reference(model, dtype)
    casts = _Casts(dtype)
    try:
        with casts:
            expected = _run(plain, image, seed)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        reason = str(error).strip() or "an assertion about its input"
        raise ValueError(f"the model cannot run on an image of shape {full}: {reason}") from error
    tensors = [x for x in (*expected[0].leaves, *expected[0].gradients.values()) if isinstance(x, Tensor)]
    if not all(x.isfinite().all() for x in tensors if x.is_floating_point()):
        raise ValueError(
            f"the plain model gives infinities or NaN for a random image of shape {full}; check its weights"
        )

    streamed = stream(_copy(model).to(dtype).eval(), tile_size, verify=False)
    try:
        with casts if casts.seen else torch.enable_grad():
            small = streamed.plan(full)
            found = _run(streamed, image, seed)
    except UnsupportedOpError as error:
        tile = _tile(tile_size, full)
        return Check("refused", full, tile, {}, refused=(error,), no_plan=str(error).splitlines()[0])
    plan, no_plan = _plan(model, plan_shape, plan_tile_size, memory_budget)
    errors, worst = _compare(found, expected)
    rounding: dict[str, float] = {}
    if TOLERANCE < max(errors.values()) < torch.inf:
        with casts:
            rounding = _compare(_run(*_shaken(_reference(model, dtype), image, generator), seed), expected)[0]
    return Check(
        verdict=_verdict(errors, rounding, small, dtype),
        image_shape=full,
        tile_size=small.tile_size,
        errors=errors,
        worst_parameter=worst,
        stages=small.stages,
        streamed_fraction=small.streamed_fraction,
        refused=small.refused,
        plan=plan,
        no_plan=no_plan,
        rounding=rounding,
    )


def explain(model: nn.Module, shape: Sequence[int]) -> str:
    """Return how a model becomes scans: what each pass over its operations makes, and the layers; the model is left as it is.

    Args:
        model: as for `check`.
        shape: (channels, height, width) of an image, or (N, channels, height, width).

    Raises:
        UnsupportedOpError: the model cannot be streamed at all.
    """
    full = (1,) * (4 - len(shape)) + tuple(shape)
    model = _copy(model).eval()
    dtype = next((p.dtype for p in model.parameters()), torch.get_default_dtype())
    captured = trace_module(model, CallKind(full, dtype, device_of(model)), symbolic=False).at(*full[2:])
    assert captured is not None
    return f"{explain_passes(captured, allow_whole=True)}\n\n{stream(model).plan(full)}"


def _run(model: nn.Module, image: Tensor, seed: int) -> tuple[Outcome, Outcome]:
    """Return the outcome of a forward and backward pass, and of a forward pass without gradients."""
    image = image.detach().clone().requires_grad_()
    module = model.module if isinstance(model, StreamingCNN) else model
    with torch.enable_grad():
        trained = outcome(model(image), module, image, seed=seed)
    with torch.no_grad():
        return trained, outcome(model(image.detach()), module, image, outputs_only=True)


def _compare(found: Sequence[Outcome], expected: Sequence[Outcome]) -> tuple[dict[str, float], str]:
    """Return the largest relative error of each kind, and the parameter with the largest."""
    both = [differences(f, e, torch.inf, _FLOOR) for f, e in zip(found, expected, strict=True)]
    outputs = [max((one.error for one in run if one.kind != "gradient"), default=0.0) for run in both]
    for k, (f, e) in enumerate(zip(found, expected, strict=True)):
        if [getattr(x, "dtype", None) for x in f.leaves] != [getattr(x, "dtype", None) for x in e.leaves]:
            outputs[k] = torch.inf
    gradients = {one.name: one.error for one in both[0] if one.kind == "gradient"}
    image = gradients.pop("", 0.0)
    worst = max(gradients, key=lambda name: gradients[name], default="")
    errors = {"outputs": outputs[0], "outputs without gradients": outputs[1]}
    return errors | {"image gradient": image, "parameter gradients": gradients.get(worst, 0.0)}, worst


def _shaken(model: nn.Module, image: Tensor, generator: torch.Generator) -> tuple[nn.Module, Tensor]:
    """The model, in place, and a copy of the image, with each number moved up or down by a unit in the last place."""
    image = image.clone()
    with torch.no_grad():
        for tensor in (image, *model.parameters()):
            sign = torch.randint(0, 2, tensor.shape, generator=generator, device="cpu").to(tensor) * 2 - 1
            tensor.mul_(1 + sign * torch.finfo(tensor.dtype).eps)
    return model, image


def _verdict(errors: dict[str, float], rounding: dict[str, float], plan: Plan, dtype: torch.dtype) -> Verdict:
    usual, most = (TOLERANCE, _MOST_ROUNDING) if dtype == torch.float64 else TOLERANCES[dtype.itemsize]
    allowed = {what: min(_OF_ROUNDING * rounding.get(what, 0.0), most) for what in errors}
    if any(error > max(usual, allowed[what]) for what, error in errors.items()):
        return "WRONG"
    if plan.streamed_fraction >= ENOUGH:
        return "exact" if plan.stages == 1 else "exact with stages"
    # An operation is refused when all that comes before it is streamed.
    return "exact trunk, rest whole" if plan.refused and all(map(_on_tokens, plan.refused)) else "partly"


def _on_tokens(error: UnsupportedOpError) -> bool:
    # Windows are cut out by views, too; of all other operations on a flattened image, the reason says so.
    named = {f"aten.{target._opname}" for target, op in OPS.items() if op.on_tokens}
    return error.op in named or "flattened image" in error.reason


def _plan(model: nn.Module, shape: Sequence[int] | None, tile_size: Any, budget: Any) -> tuple[Plan | None, str]:
    """The plan for an image of `shape`, or why there is none."""
    if shape is None:
        return None, ""
    try:
        copied = _copy(model).eval()
        return stream(copied, tile_size, memory_budget=budget).plan(tuple(shape)), ""
    except (UnsupportedOpError, ValueError) as error:
        return None, str(error).splitlines()[0]


def _tile(tile_size: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    height, width = tile_size if isinstance(tile_size, tuple) else (tile_size, tile_size)
    return min(height, shape[2]), min(width or shape[3], shape[3])


def _copy(model: nn.Module) -> nn.Module:
    """A deep copy; weights that hooks or caches hold, which deepcopy refuses, are detached."""
    values = pytree.tree_leaves([list(part.__dict__.values()) for part in model.modules()])
    computed = (value for value in values if isinstance(value, Tensor) and value.grad_fn is not None)
    return copied(model, {id(value): value.detach().clone() for value in computed})


def _reference(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy to run as plain PyTorch, in evaluation mode.

    Gradients enter its norm layers contiguous: on the CPU, PyTorch's derivative of batch norm with running statistics is wrong
    for a transposed gradient of a single image (seen in 2.15; finite differences agree with the streamed one).
    """
    reference = _copy(model).to(dtype).eval()
    for part in reference.modules():
        if isinstance(part, _NormBase):
            part.register_forward_hook(contiguous_gradient)
    return reference


class _Casts(TorchFunctionMode):
    """Turns casts to float32 inside of a model into casts to `dtype`, so that their rounding does not hide an error of ours."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype != torch.float64 or "_assert" in getattr(func, "__name__", str(func)):
            return func(*args, **kwargs)  # torch.export adds assertions of what it has seen
        if func is torch.Tensor.float:
            self.seen = True
            return args[0].to(self.dtype)
        if any(arg is torch.float32 for arg in args) or kwargs.get("dtype") is torch.float32:
            self.seen = True
            args = tuple(self.dtype if arg is torch.float32 else arg for arg in args)
            kwargs = {key: self.dtype if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)
