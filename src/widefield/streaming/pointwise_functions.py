"""An `autograd.Function` that is registered as pointwise: one operation of a capture, its own backward included."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import Function


@dataclass(frozen=True, eq=False)
class PointwiseCall:
    """One call of a registered `autograd.Function`, on tensors alone: its other arguments are those of the capture."""

    function: type[Function]
    arguments: tuple[Any, ...]  # the position of a tensor among the tensors, or a tuple of the argument

    tags: ClassVar = (torch.Tag.pointwise,)
    known: ClassVar[set[type[Function]]] = set()
    recorded: ClassVar[list["PointwiseCall"]] = []

    @property
    def __name__(self) -> str:
        return f"the autograd.Function '{self.function.__qualname__}'"

    @classmethod
    def record(cls, function: type[Function], args: tuple[Any, ...]) -> Tensor:
        """Return the result without data of a call that is captured, as one operation that names it."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        count = iter(range(len(tensors)))
        cls.recorded.append(cls(function, tuple(next(count) if isinstance(arg, Tensor) else (arg,) for arg in args)))
        return torch.ops.widefield.pointwise_function(tensors, len(cls.recorded) - 1)

    def __call__(self, *tensors: Tensor) -> Tensor:
        result = self.function.apply(*(tensors[x] if isinstance(x, int) else x[0] for x in self.arguments))
        shape = torch.broadcast_shapes(*(x.shape for x in tensors))
        if not isinstance(result, Tensor) or result.shape != shape or result.dtype != tensors[0].dtype:
            given = f"{tuple(result.shape)}, {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"{self.__name__} was registered as computing every element from the same element of its inputs, so of inputs of "
                f"shape {tuple(shape)} and {tensors[0].dtype} one such tensor was expected, got {given}"
            )
        return result


def register_op(function: type[Function]) -> type[Function]:
    """Declare that an `autograd.Function` computes every element from the same element of its inputs; usable as a decorator.

    It is then streamed as it is, its own backward included: straight-through estimators, gradient reversal, activations with a
    backward of their own, fake quantisation by given scales. Its inputs are tensors that broadcast against each other and plain
    values; it returns one tensor of the broadcast shape and of the first tensor's dtype. A function that looks at neighbours or
    at the whole map (a maximum for a scale) must not be registered: the check at first use finds such a mistake.

    Raises:
        ValueError: `function` is not a subclass of `torch.autograd.Function`.

    Examples:
        >>> @register_op
        ... class Round(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return x.round()
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         return grad
    """
    if not (isinstance(function, type) and issubclass(function, Function)):
        raise ValueError(f"register_op takes a subclass of torch.autograd.Function, got {function!r:.100}")
    PointwiseCall.known.add(function)
    return function


@torch.library.custom_op("widefield::pointwise_function", mutates_args=())
def _pointwise_function(tensors: list[Tensor], call: int) -> Tensor:
    return PointwiseCall.recorded[call](*tensors)


@_pointwise_function.register_fake
def _(tensors: list[Tensor], call: int) -> Tensor:
    return torch.empty_like(torch.broadcast_tensors(*tensors)[0], memory_format=torch.contiguous_format)
