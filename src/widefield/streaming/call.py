"""A call of a streamed module: what it is given, checked before anything is captured."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import UninitializedParameter

from widefield.streaming.captured import CallKind
from widefield.streaming.execution import Statistics
from widefield.streaming.foreground import parse_mask
from widefield.streaming.need import Wanted, parse_region
from widefield.streaming.planner import usable_memory
from widefield.streaming.program import Program
from widefield.streaming.tiles import LazyImage, Normalisation, map_input, pixel_dtype

if TYPE_CHECKING:
    from widefield.streaming.module import StreamingCNN


@dataclass(frozen=True, eq=False)
class Inputs:
    """A call of a streamed module, checked."""

    image: Tensor | LazyImage  # one image or batch
    map_inputs: tuple[Tensor | LazyImage, ...]  # what else `forward` takes
    kind: CallKind  # what a capture needs to know of them
    wanted: Wanted | None = None  # the part of the image that is asked for; None: all of it
    fill: Any = 0.0  # the pixel that takes the place of the background, as it was given
    gather: bool = False  # put maps among the results together from the bands of all processes
    prepared: "PreparedImage | None" = None  # what is known of the image already


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image, and what operations over the whole of it have given; see `StreamingCNN.prepare`."""

    inputs: Inputs
    statistics: Statistics
    state: Any

    def check_call(self, maps: Sequence[Any], mask: Any) -> None:
        """Raise ValueError if a model is called on it in a way that needs more than what is known."""
        if maps or mask is not None:
            raise ValueError("maps and a mask are given to prepare(), and hold for all regions: leave them out here")
        if torch.is_grad_enabled():
            raise ValueError(
                "what prepare() returned holds results without their gradients: use it under torch.no_grad(), or call the "
                "model with the image itself, which computes them again with gradients"
            )

    def check_state(self, network: "StreamingCNN", program: Program) -> None:
        """Raise ValueError if anything has changed on which what is known depends."""
        if self.state != state_of(network, program, self.inputs):
            raise ValueError(
                "the image, the module (a parameter, a buffer, a mode, a setting) or how it is called (autocast, normalisation) "
                "has changed since prepare() looked at this image: prepare it again"
            )


def state_of(network: "StreamingCNN", program: Program, inputs: Inputs) -> Any:
    """Return all that results of `prepare` depend on, for comparison."""
    pixels = [x for x in (inputs.image, *inputs.map_inputs) if isinstance(x, Tensor)]
    tensors = (*network.module.parameters(), *network.module.buffers(), *pixels)
    versions = [(x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors]
    return program.kind, network.normalisation, versions


def check_inputs(
    network: "StreamingCNN", image: Any, maps: Sequence[Any], region: Any, mask: Any, fill: Any, gather: bool = False
) -> Inputs:
    """Check what `network` is called with. Raises ValueError for what cannot be streamed."""
    prepared = image if isinstance(image, PreparedImage) else None
    if prepared is not None:
        prepared.check_call(maps, mask)
        image, maps, fill = prepared.inputs.image, prepared.inputs.map_inputs, prepared.inputs.fill
    if network.enabled:
        refuse_transforms([image, *maps, *network.parameters(), *network.buffers()])
    kind = kind_of_call(network.module, network.normalisation, image, maps)
    if isinstance(image, Tensor):
        image = _with_saliency_hook(network, image.to(kind.device) if network.copy_to_gpu else image)
        kind = replace(kind, image_requires_grad=image.requires_grad)
    if prepared is None:
        wanted = parse_wanted(kind, image, region, mask)
    else:
        foreground = (prepared.inputs.wanted or Wanted()).foreground
        wanted = Wanted(parse_region(region, kind.size), foreground, reductions=False)
    if wanted is not None and not network.enabled:
        raise ValueError("a region or a mask needs streaming, which disable() has turned off: call enable()")
    return in_band(network, Inputs(image, tuple(maps), kind, wanted, fill, gather, prepared))


def parse_wanted(kind: CallKind, image: Any, region: Any, mask: Any) -> Wanted | None:
    """Return the part of an image that is asked for; None if it is all of it. Raises ValueError."""
    if region is None and mask is None:
        return None
    return Wanted(parse_region(region, kind.size), parse_mask(mask, image, kind.shape))


def in_band(network: "StreamingCNN", inputs: Inputs) -> Inputs:
    """Return the inputs, of whose image this process makes a band; without other processes as they are.

    Raises ValueError if other processes, which would wait for this one, were called in another way.
    """
    if network.ranks is None or not network.enabled:
        return inputs
    kind, ranks = inputs.kind, network.ranks
    wanted = replace(inputs.wanted or Wanted(), band=(ranks.rank, ranks.size))
    how = {
        "shape": kind.shape,
        "maps": kind.map_inputs,
        "region": wanted.region,
        "mask": None if wanted.foreground is None else wanted.foreground.checksum,
        "fill": repr(inputs.fill),
        "prepare": not wanted.outputs,
        "gather": inputs.gather,
        "tile_size": network.tile_size,
        "memory_budget": network.memory_budget,
        "gradients": torch.is_grad_enabled(),
        "image requires grad": kind.image_requires_grad,
        "parameters that require grad": sum(p.requires_grad for p in network.module.parameters()),
    }
    limit = min(ranks.agree(how, usable_memory(kind.device)))
    network._limit = limit if network._limit is None else network._limit
    return replace(inputs, wanted=wanted)


def _with_saliency_hook(network: "StreamingCNN", image: Tensor) -> Tensor:
    """`image`, or a view or leaf of it whose gradient becomes `saliency_map`, if that is wanted."""
    if not (network.saliency and torch.is_grad_enabled() and image.is_floating_point()):
        return image
    image = image.view_as(image) if image.requires_grad else image.detach().requires_grad_()
    image.register_hook(partial(_keep_saliency, ref(network)))
    return image


def _keep_saliency(network: "ref[StreamingCNN]", gradient: Tensor) -> None:
    if (found := network()) is not None:
        found.saliency_map = gradient.cpu()


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
