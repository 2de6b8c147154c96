"""One trace of a module for images of many sizes.

torch.export runs the module once, at a real height and width that stand for symbols. What depends on them comes out as a formula
(`(s0 - 1) // 2 + 1`), and every decision that Python or PyTorch took because of them (`if height % 32:`) as a guard: a
condition on the symbols. For another size the same trace holds if all guards do; its numbers are then those of the formulas.
If a guard fails the module must be traced again at that size, so a size that a model writes into its operations is never reused.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from widefield.streaming.captured import Captured
from widefield.streaming.errors import UnsupportedOpError

_PRINTER = PythonPrinter()


@dataclass(frozen=True, slots=True)
class Formula:
    """A number of a trace that depends on the image's height and width."""

    expression: sympy.Expr


@dataclass(frozen=True)
class Trace:
    """A captured forward pass whose numbers may be `Formula`s. `captured` is valid at its `image_shape` once they are filled in.

    `dims` are the height and width of the image, then of each other map that forward takes: symbols, formulas of those of
    maps before, or numbers. `guards` are the conditions under which the trace
    holds, `ranges` the limits of the symbols. `mode_dependent`: it holds for the grad mode of its capture only.
    """

    captured: Captured
    dims: tuple[sympy.Expr, ...]
    guards: tuple[sympy.Basic, ...] = ()
    ranges: Mapping[sympy.Symbol, tuple[sympy.Expr, sympy.Expr]] | None = None
    mode_dependent: bool = False

    @property
    def fixed(self) -> bool:
        """True if it holds for one size only."""
        return not any(dim.free_symbols for dim in self.dims)

    def at(self, *lengths: int) -> Captured | None:
        """The forward pass for inputs of another height and width each, as many as `dims`; None where the trace does not hold."""
        sizes = self._sizes(lengths)
        if sizes is None or not self._holds(sizes):
            return None
        known = dict(zip(self._formulas, self._numbers(*sizes.values()), strict=True))

        def number(leaf: Any) -> Any:
            return known[leaf] if isinstance(leaf, Formula) else leaf

        captured = self.captured
        nodes = []
        for node, sized in zip(captured.nodes, self._sized, strict=True):
            args, kwargs = pytree.tree_map(number, (node.args, node.kwargs)) if sized else (node.args, node.kwargs)
            grows = None if self.fixed else tuple(isinstance(n, Formula) for n in node.shape)
            shape = tuple(map(number, node.shape))
            nodes.append(replace(node, args=args, kwargs=kwargs, shape=shape, grows=grows))
        return replace(
            captured,
            image_shape=(*captured.image_shape[:2], *lengths[:2]),
            shapes={name: (tuple(map(number, shape)), dtype) for name, (shape, dtype) in captured.shapes.items()},
            nodes=tuple(nodes),
            outputs=tuple(map(number, captured.outputs)),
        )

    def _sizes(self, lengths: tuple[int, ...]) -> dict[sympy.Symbol, int] | None:
        """The symbols' values for these heights and widths, None if there are none."""
        sizes: dict[sympy.Symbol, int] = {}
        for expression, length in zip(self.dims, lengths, strict=True):
            factor, rest = expression.as_coeff_Mul()
            if isinstance(rest, sympy.Symbol) and rest not in sizes:
                if length % int(factor):
                    return None
                sizes[rest] = length // int(factor)
            elif expression.xreplace(sizes) != length:
                return None
        return sizes

    def _holds(self, sizes: dict[sympy.Symbol, int]) -> bool:
        for symbol, (low, high) in (self.ranges or {}).items():
            if symbol in sizes and not low <= sizes[symbol] <= high:
                return False
        try:
            return all(self._guards(*sizes.values()))
        except (ArithmeticError, TypeError, ValueError):  # divides by 0, say, for sizes for which another does not hold
            return False

    @cached_property
    def _sized(self) -> list[bool]:
        """For each node, True if its arguments depend on the size."""
        return [
            any(isinstance(leaf, Formula) for leaf in pytree.tree_leaves((node.args, node.kwargs)))
            for node in self.captured.nodes
        ]

    @cached_property
    def _formulas(self) -> tuple[Formula, ...]:
        captured = self.captured
        numbers = [(node.args, node.kwargs, node.shape) for node in captured.nodes], captured.shapes, captured.outputs
        return tuple(dict.fromkeys(leaf for leaf in pytree.tree_leaves(numbers) if isinstance(leaf, Formula)))

    @cached_property
    def _numbers(self) -> Callable[..., tuple[Any, ...]]:
        """The formulas as a function of the sizes' symbols. Raises UnsupportedOpError where one depends on anything else."""
        expressions = [formula.expression for formula in self._formulas]
        if foreign := {symbol for e in expressions for symbol in e.free_symbols} - set(self._symbols):
            reason = f"makes a tensor whose size depends on the values of another ({', '.join(map(str, foreign))})"
            remedy = "compute such tensors outside of the streamed part of the model"
            raise UnsupportedOpError("", "forward", reason, remedy)
        return _compiled(self._symbols, expressions)

    @cached_property
    def _guards(self) -> Callable[..., tuple[bool, ...]]:
        """The guards likewise. One that depends on anything else does not hold."""
        known = set(self._symbols)
        return _compiled(self._symbols, [g if g.free_symbols <= known else sympy.false for g in self.guards])

    @property
    def _symbols(self) -> list[sympy.Symbol]:
        """In the order of `_sizes`."""
        return list(dict.fromkeys(symbol for dim in self.dims for symbol in dim.free_symbols))


def _compiled(symbols: Sequence[sympy.Symbol], expressions: Sequence[sympy.Basic]) -> Callable[..., tuple[Any, ...]]:
    """All `expressions` as one function of `symbols`, in Python's own numbers."""
    results = "".join(f"{_PRINTER.doprint(expression)}, " for expression in expressions)
    function: Callable[..., tuple[Any, ...]] = eval(
        f"lambda {', '.join(map(str, symbols))}: ({results})", {"math": math, "torch": torch}
    )
    return function


def _number(value: sympy.Basic) -> int | float | bool:
    """A formula without symbols as Python has it."""
    if value.is_Boolean:
        return bool(value)
    return int(value) if value.is_Integer else float(value)  # type: ignore[arg-type]


def formula(value: Any) -> Any:
    """A symbolic number of a trace as a `Formula`, anything else as it is."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    expression = value.node.expr
    return Formula(expression) if expression.free_symbols else _number(expression)
