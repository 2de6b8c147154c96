"""The dtypes of results under autocast, of which the plan's bytes are made.

A capture runs without autocast, and what it captures is run under it: each operator casts then as PyTorch's autocast has it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from widefield.streaming.captured import CAPTURE_DEVICE, Node, Ref
from widefield.streaming.local import LocalCall
from widefield.streaming.rules import Reduction
from widefield.streaming.rules.flipped import mirror
from widefield.streaming.rules.reductions import precise
from widefield.streaming.rules.rewriting import parts_of
from widefield.streaming.rules.rolled import first_positions, joined, straight, turn

# What stands for a map in another order, or with some of it once more: other nodes are captured on the map itself.
_AS_BEFORE = (turn, straight, joined, first_positions, mirror)


@dataclass(frozen=True)
class Autocast:
    """Autocast to `dtype` on a kind of `device`; `known` are dtypes of results by name, whatever the image's size."""

    device: str
    dtype: torch.dtype
    known: dict[str, torch.dtype] = field(default_factory=dict)

    def dtypes(
        self, nodes: Sequence[Node], given: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> dict[str, torch.dtype]:
        """Return the dtype of each node's result by name; `given` are shapes and dtypes of what comes from outside."""
        if any(node.name not in self.known for node in nodes):
            self.known.update(_computed(self.device, self.dtype, nodes, given))
        return self.known


def _computed(
    device: str, autocast: torch.dtype, nodes: Sequence[Node], given: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> dict[str, torch.dtype]:
    """Run `nodes` on tensors without storage. Those that do not run so have the dtype that was captured."""
    values: dict[str, Any] = {}
    with FakeTensorMode(), torch.no_grad(), torch.autocast(device, autocast):

        def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def here(leaf: Any) -> Any:
            if isinstance(leaf, torch.device) and leaf == CAPTURE_DEVICE:
                return torch.device(device)
            return values[leaf.name] if isinstance(leaf, Ref) else leaf

        values.update({name: empty(*of) for name, of in given.items()})
        for node in nodes:
            if isinstance(node.target, Reduction):
                dtype = precise(values[node.refs[0]].dtype)
                shapes = zip(parts_of(node), node.kwargs["shapes"], strict=True)
                values.update({node.name: empty((), dtype)} | {part: empty(shape, dtype) for part, shape in shapes})
                continue
            result = None
            if node.target in _AS_BEFORE:
                result = values[node.refs[0]]
            elif not isinstance(node.target, LocalCall):
                try:
                    args, kwargs = pytree.tree_map(here, (node.args, node.kwargs))
                    result = node.target(*args, **kwargs)
                    result = result if node.pick is None else result[node.pick]
                except Exception:  # an operator that looks at values, say
                    result = None
            values[node.name] = result if isinstance(result, Tensor) else empty(node.shape, node.dtype)
    return {name: value.dtype for name, value in values.items()}
