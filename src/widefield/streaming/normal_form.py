"""Operators that differ only in how they are written, brought to one form, which the rules know.

What PyTorch itself composes of other operators, and no rule knows, is taken apart.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from widefield.streaming.captured import Node, Ref
from widefield.streaming.rules import op_of
from widefield.streaming.rules.channels import explicit
from widefield.streaming.rules.sampling import deformed

aten = torch.ops.aten

# Factories that take only dtype and device from their first argument.
_FACTORIES: dict[Any, Callable[..., torch.Tensor]] = {
    aten.new_empty.default: aten.empty.memory_format,
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
}
# Operators that are others under the name of a reduction.
_NAMESAKES: dict[Any, Any] = {aten.max.other: aten.maximum.default, aten.min.other: aten.minimum.default}
# Operators that take only the shape from their second argument.
_SHAPED_LIKE: dict[Any, Any] = {
    aten.view_as.default: aten.reshape.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}


def normal_form(node: Node, shapes: Mapping[str, tuple[int, ...]]) -> Node:
    """Return `node`, or another that does the same; `shapes` are those of what it reads."""
    if node.target in _FACTORIES:
        given = {key: value for key, value in node.kwargs.items() if value is not None}
        kwargs = {"dtype": node.dtype, "device": torch.device("cpu"), **given}
        return replace(node, target=_FACTORIES[node.target], args=node.args[1:], kwargs=kwargs)
    if node.target is aten.einsum.default:
        equation = explicit(node.args[0], [len(shapes[operand.name]) for operand in node.args[1]])
        return replace(node, args=(equation, *node.args[1:]))
    if node.target in _NAMESAKES:
        return replace(node, target=_NAMESAKES[node.target])
    if node.target in _SHAPED_LIKE:
        return node.derived(_SHAPED_LIKE[node.target], node.args[0], list(node.shape))
    if node.target is aten.broadcast_tensors.default and node.pick is not None:
        one = node.args[0][node.pick]
        if shapes[one.name] == node.shape:
            return node.derived(aten.alias.default, one)
        return node.derived(aten.expand.default, one, list(node.shape))
    if node.op == "torchvision.deform_conv2d":
        return replace(node, target=deformed)
    if node.target is aten.slice.Tensor and shapes[node.args[0].name] == node.shape and node.args[4:] in ((), (1,)):
        return node.derived(aten.alias.default, node.args[0])  # `x[:]`
    if node.target is aten.slice_scatter.default and shapes[node.args[1].name] == node.shape:  # all of it
        return node.derived(aten.to.dtype, node.args[1], node.dtype)
    return node


def taken_apart(
    node: Node, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
) -> tuple[Node, ...]:
    """The operators of which PyTorch composes that of `node`, where it is no known one; else `node` alone.

    They are those that run without it being known to autograd, so that their derivatives make up its own.
    """
    composed = isinstance(node.target, torch._ops.OpOverload) and node.target._can_decompose()
    if not composed or op_of(node.target) is not None or node.dtype.is_complex:
        return (node,)
    assert isinstance(node.target, torch._ops.OpOverload)
    with FakeTensorMode(), torch.no_grad(), _Parts(node) as parts:
        given = {name: torch.empty(shapes[name], dtype=dtypes[name], device="cpu") for name in node.refs}
        parts.name(given)

        def empty(value: Any) -> Any:
            return given[value.name] if isinstance(value, Ref) else value

        args, kwargs = pytree.tree_map(empty, (node.args, node.kwargs), is_leaf=lambda value: isinstance(value, Ref))
        try:
            result = node.target.decompose(*args, **kwargs)
            last = parts.names[id(result if node.pick is None else result[node.pick])]
        except (RuntimeError, KeyError, TypeError, NotImplementedError):
            return (node,)
    if parts.changes_something:
        return (node,)
    return (*parts.nodes, node.derived(aten.alias.default, last))


class _Parts(TorchDispatchMode):
    """Records operators as nodes; `names` are the tensors that they read and make, by identity."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node
        self.nodes: list[Node] = []
        self.names: dict[int, Ref] = {}
        self.changes_something = False
        self._held: list[Tensor] = []  # as long as they live, no other tensor has their identity

    def name(self, tensors: Mapping[str, Tensor]) -> None:
        self._held += tensors.values()
        self.names.update({id(tensor): Ref(name) for name, tensor in tensors.items()})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made: Any = [result] if isinstance(result, (Tensor, torch.device)) else list(result)
        if not self.names or not any(isinstance(each, Tensor) for each in made):  # what is given; questions about it
            return result
        if func._schema.is_mutable:
            func = self._with_result(func, args[0], result)

        def ref(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return self.names[id(value)] if isinstance(value, FakeTensor) else value.item()

        args, kwargs = pytree.tree_map(ref, (args, kwargs or {}))
        part = replace(self.node, target=func, args=args, kwargs=kwargs, pick=None, grows=None)
        for k, tensor in enumerate(made):
            name, pick = f"{self.node.name}@{len(self.nodes)}", None if isinstance(result, Tensor) else k
            self.nodes.append(replace(part, name=name, pick=pick, shape=tuple(tensor.shape), dtype=tensor.dtype))
            self.name({name: tensor})
        return result

    def _with_result(self, func: Any, changed: Tensor, result: Any) -> Any:
        """The operator that gives what `func` puts in the place of a tensor, of which there must be no views."""
        storage = changed.untyped_storage()._cdata
        alone = sum(tensor.untyped_storage()._cdata == storage for tensor in self._held) == 1
        found = getattr(getattr(aten, func._opname.removesuffix("_"), None), func._overloadname, None)
        own = alone and result is changed and self.names[id(changed)].name not in self.node.refs
        self.changes_something |= not own or found is None
        return found
