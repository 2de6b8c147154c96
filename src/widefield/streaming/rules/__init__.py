"""One rule per operation: how its extents follow, and how it runs on a tile. `place` looks a rule up and applies it."""

from widefield.streaming.rules import channels, pointwise, random, resize, shapes, windows
from widefield.streaming.rules.base import RULES, Axes, Maps, Placed, Read, Run, Work, place

__all__ = ["RULES", "Axes", "Maps", "Placed", "Read", "Run", "Work", "place"]
_ = (channels, pointwise, random, resize, shapes, windows)  # importing them fills RULES
