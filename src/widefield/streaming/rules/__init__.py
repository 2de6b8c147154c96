"""One rule per operation: how its extents follow, and how it runs on a tile. `apply_rule` looks a rule up and applies it.

Operations over the whole image have a rewriting instead: reductions, and local operations on their results. All that is known of an
operation is in one `Op`, made by the decorators of its rule or rewriting.
"""

import importlib
import pkgutil

from widefield.streaming.rules.base import Axes, Maps, Op, Placed, Read, Run, TileContext, apply_rule, op_of, swap_refs
from widefield.streaming.rules.flat import unflatten
from widefield.streaming.rules.reductions import Reduction

__all__ = [
    "Axes",
    "Maps",
    "Op",
    "Placed",
    "Read",
    "Reduction",
    "Run",
    "TileContext",
    "apply_rule",
    "op_of",
    "swap_refs",
    "unflatten",
]
for _file in pkgutil.iter_modules(__path__):  # importing a file registers its operations and rewritings
    importlib.import_module(f"{__name__}.{_file.name}")
