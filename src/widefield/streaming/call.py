"""A call of a streamed module at its two ends: inputs, checked before anything is captured, and the result put together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from widefield.streaming.captured import CallKind
from widefield.streaming.execution import Statistics, fill_refs
from widefield.streaming.fingerprint import NOTHING, mark_left
from widefield.streaming.foreground import Foreground
from widefield.streaming.need import Wanted
from widefield.streaming.program import Program
from widefield.streaming.rules.norms import update_running_statistics
from widefield.streaming.tiles import LazyImage, Normalisation, map_input, pixel_dtype


@dataclass(frozen=True, eq=False)
class Inputs:
    """A call of a streamed module, checked.

    Attributes:
        image: One image or batch.
        maps: What else `forward` takes.
        kind: What a capture needs to know of them.
        wanted: The part of the image that is asked for; None: all of it.
        fill: The pixel that takes the place of the background, as it was given.
        gather: Put maps among the results together from the bands of all processes.
        prepared: What is known of the image already.
    """

    image: Tensor | LazyImage
    maps: tuple[Tensor | LazyImage, ...]
    kind: CallKind
    wanted: Wanted | None = None
    fill: Any = 0.0
    gather: bool = False
    prepared: "PreparedImage | None" = None


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image, and what operations over the whole of it have given; see `StreamingCNN.prepare`."""

    inputs: Inputs
    statistics: Statistics
    made_for: Any

    @property
    def foreground(self) -> Foreground | None:
        return None if self.inputs.wanted is None else self.inputs.wanted.foreground

    def check_call(self, maps: Sequence[Any], mask: Any) -> None:
        """Raise ValueError if a model is called on it in a way that needs more than what is known."""
        if maps or mask is not None:
            raise ValueError("maps and a mask are given to prepare(), and hold for all regions: leave them out here")
        if torch.is_grad_enabled():
            raise ValueError(
                "what prepare() returned holds results without their gradients: use it under torch.no_grad(), or call the "
                "model with the image itself, which computes them again with gradients"
            )


def kind_of_call(module: nn.Module, normalisation: Normalisation, image: Any, maps: Sequence[Any]) -> CallKind:
    """Check what `module` is called with, and return what its capture depends on. Raises ValueError for what cannot be streamed."""
    device, dtype = device_and_dtype(module, image)
    shape = _checked_shape(image, device, dtype, normalisation)
    given = tuple(map_input(x, shape, device, dtype) for x in maps)
    return CallKind(shape, dtype, device, isinstance(image, Tensor) and image.requires_grad, given)


def device_and_dtype(module: nn.Module, image: Any) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of `module`, or the image's own device and dtype for a module without parameters."""
    tensors = [*module.parameters(), *module.buffers()]
    if lazy := [name for name, p in module.named_parameters() if isinstance(p, UninitializedParameter)]:
        raise ValueError(
            f"the parameter '{lazy[0]}' has no shape yet: call the plain module once on a small image first"
        )
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    if floating:
        largest = max(floating, key=Tensor.numel)
        return largest.device, largest.dtype
    if isinstance(image, Tensor):
        return image.device, image.dtype if image.is_floating_point() else torch.get_default_dtype()
    return torch.device("cpu"), torch.get_default_dtype()


def _checked_shape(
    image: Any, device: torch.device, dtype: torch.dtype, normalisation: Normalisation
) -> tuple[int, ...]:
    """The image's shape (N, C, H, W). Raises ValueError for what cannot be streamed."""
    if device.type == "meta":
        raise ValueError('the module is on "meta", without values: move it with .to_empty() and give it weights first')
    if isinstance(image, Tensor):
        shape = tuple(image.shape)
        if image.layout != torch.strided:
            raise ValueError(
                f"the image is {image.layout}, and only dense ones are streamed: convert it with .to_dense()"
            )
        if len(shape) != 4:
            raise ValueError(
                f"expected an image (N, C, H, W), got a tensor of shape {shape}; add a batch dimension with [None]"
            )
        if image.device != device and image.device.type != "cpu":
            raise ValueError(f"the image is on {image.device}, the module on {device}; move one of them")
        if image.is_floating_point() and image.dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise ValueError(f"the image is {image.dtype}, the module {dtype}; convert one of them with .to()")
    elif isinstance(image, LazyImage):
        shape = (1, *(int(n) for n in image.shape))
        if len(shape) != 4:
            raise ValueError(f"expected a lazy image of shape (C, H, W), got {tuple(image.shape)}")
    else:
        raise ValueError(
            "expected a tensor (N, C, H, W), an image with shape, dtype and read(y, x, height, width), or a list of "
            f"them; got {type(image).__name__}"
        )
    if 0 in shape:
        raise ValueError(f"the image is empty: its shape is {shape}")
    pixel_dtype(image)
    normalisation.check_channels(shape[1])
    return shape


def bind(module: nn.Module, program: Program, device: torch.device) -> dict[str, Any]:
    """The parameters and buffers of `module` as they are now, by the names that the captured program uses."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    if torch.is_grad_enabled():
        learned = [key for key in set(program.captured.bound.values()) if tensors[key].requires_grad]
        tensors.update(zip(learned, _Together.apply(*(tensors[key] for key in learned)), strict=True))
    values: dict[str, Any] = {name: tensors[key] for name, key in program.captured.bound.items()}
    values.update({name: tensor.to(device) for name, tensor in program.captured.constants.items()})
    return values


def finish(module: nn.Module, program: Program, values: dict[str, Any], written: dict[str, Any]) -> Any:
    """The result among `values`, with what is `written` in the place of maps.

    Running statistics, and attributes that forward sets, are as the plain module leaves them.
    """
    for path, name in program.statistics:
        update_running_statistics(module.get_submodule(path), values[name])
    outputs, spec = program.captured.outputs, program.captured.spec
    attributes = pytree.tree_unflatten(fill_refs(outputs, values), spec)[1]
    result = pytree.tree_unflatten(fill_refs(outputs, {**values, **written}), spec)[0]
    for (path, name, read), value in zip(program.captured.attributes, attributes, strict=True):
        part = module.get_submodule(path)
        setattr(part, name, value if read else mark_left(value, before=vars(part).get(name, NOTHING)))
    return result


class _Together(torch.autograd.Function):
    """The same tensors, whose gradients arrive all at once: a backward pass that fails has changed none of them."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads


def refuse_transforms(values: Iterable[Any]) -> None:
    """Raise ValueError where derivatives would be lost: in torch.func's transforms, for `values` with forward-mode tangents."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        what = "called inside of a transform of torch.func (jvp, jacrev, grad, vmap, ...)"
    elif any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in values):
        what = "differentiated in forward mode: its image or a parameter is a dual tensor"
    else:
        return
    raise ValueError(
        f"a streamed network cannot be {what}. Use backward() or torch.autograd.grad() on its result, which stream; or the plain "
        "module (StreamingCNN.module)."
    )
