"""A captured program without updates in place.

PyTorch's own way, `run_decompositions({})`, traces the whole program a second time, which takes two thirds of a capture. Nearly all
networks update maps in place only where nobody looks at the old values (`ReLU(inplace=True)`, `x += shortcut`). There an update is
the same operation with a result, and whatever uses the map afterwards uses the result. Every other program goes PyTorch's way: one
that updates views, weights or the image, or changes the dtype, and one with operations that PyTorch breaks into others.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch._export.utils import _is_cia_op, _is_preservable_cia_op
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils import _pytree as pytree

from widefield.streaming.rules import op_of
from widefield.streaming.rules.pointwise import pointwise

aten = torch.ops.aten
# Operations that PyTorch breaks into others, and the engine knows as they are.
_KNOWN = (aten.reshape.default, aten.flatten.using_ints, aten.dropout.default)


def functional(program: ExportedProgram) -> ExportedProgram:
    """Return a program that computes the same without updates in place; `program` itself, changed, if that is simple."""
    for node in program.graph.nodes:
        # Such a dropout gives its input itself, of which run_decompositions of PyTorch 2.11 makes a copy.
        if node.target is aten.dropout.default and (not node.args[2] or node.args[1] == 0):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    nodes = list(program.graph.nodes)
    holders: dict[Any, list[Node]] = defaultdict(list)
    for node in nodes:
        for storage in _storages(node):
            holders[storage].append(node)
    updates = [node for node in nodes if node.op == "call_function" and _is_update(node.target)]
    if not all(map(_stays, nodes)) or not all(_is_simple(node, holders) for node in updates):
        return program.run_decompositions({})
    for node in updates:
        updated = node.args[0]
        assert isinstance(updated, Node)
        node.target = _result_form(node.target)
        updated.replace_all_uses_with(node, delete_user_cb=node.__lt__)
    return program


def _is_update(target: Any) -> bool:
    return isinstance(target, OpOverload) and target._schema.is_mutable


def _stays(node: Node) -> bool:
    """True if PyTorch would keep the operation, in place or not."""
    if isinstance(node.target, HigherOrderOperator):
        return False
    if node.target in (aten.batch_norm.default, aten.native_batch_norm.default):
        # In training mode it updates running statistics, which its schema does not tell.
        return not node.args[5] or node.args[3] is None
    if not isinstance(node.target, OpOverload) or node.target in _KNOWN or _is_update(node.target):
        return True
    return _is_preservable_cia_op(node.target) or not _is_cia_op(node.target)


def _result_form(target: Any) -> OpOverload | None:
    """Return the operation with a result that computes what the elementwise `target` writes."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None) if name.endswith("_") else None
    found: OpOverload | None = getattr(packet, target._overloadname, None)
    op = op_of(found)
    return found if op is not None and op.rule is pointwise and not op.stops_gradients else None


def _is_simple(node: Node, holders: dict[Any, list[Node]]) -> bool:
    """True if nothing before `node` shares the memory that it updates, and the result has its dtype."""
    if _result_form(node.target) is None:
        return False
    (storage,) = _storages(node)
    first, *others = holders[storage]
    dtypes = {value.meta["val"].dtype for value in node.all_input_nodes if isinstance(value.meta.get("val"), Tensor)}
    return (
        first.op == "call_function"
        and isinstance(first.meta["val"], Tensor)
        and all(other > node or (_is_update(other.target) and other.args[0] in holders[storage]) for other in others)
        and dtypes == {node.meta["val"].dtype}
        and node.meta["val"].is_floating_point()
    )


def _storages(node: Node) -> set[int]:
    """The memory that the node's results lie in: tensors that share it have the same numbers."""
    values = pytree.tree_leaves(node.meta.get("val"))
    return {value.untyped_storage()._cdata for value in values if isinstance(value, Tensor)}
