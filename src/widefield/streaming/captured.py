"""A module's forward pass as data: operations on named tensors."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from widefield.streaming.errors import UnsupportedOpError

CAPTURE_DEVICE = torch.device("cpu")  # the device that a capture pretends to run on, whatever the real one


@dataclass(frozen=True, slots=True)
class Ref:
    """An argument that is the result of another node, or an input."""

    name: str


@dataclass(frozen=True)
class Node:
    """One operation. `target` is an ATen operator or a plain function; of a tuple result, `pick` says which item is meant.

    `shape` and `dtype` are those of the result for the image size that was captured. `grows` says for each dimension whether it
    follows from the image's size or is a number of the module; None where the capture holds for one size and cannot tell.
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype
    pick: int | None = None
    module_path: str = ""
    source: str = ""
    grows: tuple[bool, ...] | None = None

    @cached_property
    def op(self) -> str:
        """The operation's name as PyTorch prints it, such as "aten.conv2d"."""
        if isinstance(self.target, torch._ops.OpOverload):
            return f"{self.target.namespace}.{self.target._opname}"
        return getattr(self.target, "__name__", str(self.target))

    @cached_property
    def refs(self) -> tuple[str, ...]:
        """Names of the nodes that this one reads, in the order of its arguments."""
        return (*_refs(self.args), *_refs(self.kwargs.values()))

    def derived(
        self, target: Callable[..., Any], *args: Any, name: str = "", shape: Sequence[int] | None = None
    ) -> "Node":
        """Return another operation in this one's place or, by another name, beside it."""
        shape = tuple(self.shape if shape is None else shape)
        return replace(self, name=name or self.name, target=target, args=args, kwargs={}, pick=None, shape=shape)

    def refuse(self, reason: str, remedy: str) -> UnsupportedOpError:
        return UnsupportedOpError(self.module_path, self.op, reason, remedy, self.source)


def _refs(arguments: Iterable[Any]) -> Iterator[str]:
    for argument in arguments:
        if isinstance(argument, Ref):
            yield argument.name
        elif isinstance(argument, (list, tuple)):
            yield from _refs(argument)


class MapInput(NamedTuple):
    """A map that forward takes besides the image, as a capture sees it: its height and width stand last."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool = False


@dataclass(frozen=True)
class CallKind:
    """The way in which a module is called, as far as its capture may depend on it."""

    shape: tuple[int, ...]  # of the image, (N, C, H, W)
    dtype: torch.dtype  # of the image as the module gets it
    device: torch.device = CAPTURE_DEVICE  # where the module is
    image_requires_grad: bool = False
    map_inputs: tuple[MapInput, ...] = ()  # the maps that it is called with besides

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.shape[2], self.shape[3]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Height and width of the image, then of each of the maps."""
        return (*self.size, *(n for x in self.map_inputs for n in x.shape[-2:]))

    @property
    def requires_grad(self) -> tuple[bool, ...]:
        """True for the image and each of the maps that requires grad."""
        return self.image_requires_grad, *(x.requires_grad for x in self.map_inputs)

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of the autocast that is on where the module is."""
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def at(self, size: tuple[int, int]) -> "CallKind":
        """The same for an image of another height and width, and for maps that are the same share of it."""

        def scaled(length: int, new: int, old: int) -> int:
            return -(-new * length // old)

        shapes = ((*x.shape[:-2], *map(scaled, x.shape[-2:], size, self.size)) for x in self.map_inputs)
        maps = tuple(x._replace(shape=shape) for x, shape in zip(self.map_inputs, shapes, strict=True))
        return replace(self, shape=(*self.shape[:2], *size), map_inputs=maps)


@dataclass(frozen=True)
class Captured:
    """A module's forward pass at one image size.

    `image` is the name of the image, `map_inputs` are those of the other maps that forward takes; `bound` gives for the name of a
    parameter or buffer its state_dict key, `constants` the tensors that the forward pass creates from numbers. `outputs` are `Ref`s
    or plain Python values, in the order of `spec`.
    `attributes` are the attributes that forward has set, whose values are the last outputs: the path of the module, the name, and
    whether forward reads it before it sets it.
    `synchronised` are the paths of batch norm layers whose statistics are those of all processes.
    """

    image: str
    image_shape: tuple[int, ...]
    bound: dict[str, str]
    constants: dict[str, torch.Tensor]
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]
    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]
    spec: pytree.TreeSpec
    synchronised: frozenset[str] = frozenset()
    attributes: tuple[tuple[str, str, bool], ...] = ()
    map_inputs: tuple[str, ...] = ()

    @property
    def spatial_inputs(self) -> tuple[str, ...]:
        """Names of the image and of the other maps that forward takes, in its order."""
        return self.image, *self.map_inputs


def overwrite(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return what `x` holds after `x.copy_(source)`."""
    return source.to(x.dtype).expand_as(x)
