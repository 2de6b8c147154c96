"""Programs: a captured module as a list of scans, and of plain operations before, between and after them.

    plain operations   parameters, what is computed from them alone, and what is computed from reductions: ordinary tensors
    stages             maps and their reductions over the whole image: tile by tile, by the scan

A model without global operations is one stage. Squeeze-and-Excite is two: the first one ends in the sum of a map over the
image, two small layers run on it, and the second one multiplies the map by the result. Stages and plain operations are chained
by ordinary autograd. All of this holds no tensors, so it can be kept and used for every image of the same size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from widefield.streaming.captured import Captured, Node, Ref
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.rules import Axes, Op, Placed, Reduction
from widefield.streaming.schedule import Flow


@dataclass(frozen=True)
class Value:
    """A map of a stage: its whole `shape` and dtype, where height and width stand, and how it is computed (`target`, whose name is
    `op`; `view`: not at all; `rectified`: with a ReLU behind the op). `itemsize` is the bytes of an element as it is computed,
    under autocast say.

    `placed` is None for a stage input. `sources` are the indices of the maps that it reads, in the order of `placed.reads`.
    `weights` names the weights that it uses; the gradients of `weight_bytes` of them are computed at a time. A value with a
    `reduction` is no map: it is gathered over all tiles of its sources, and `parts` names the tensors that come out; its shape is
    the extent of the sources. What is computed of a map that leaves the stage begins at row and column `begin` of the
    whole map (see `rules.rolled`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: Axes
    itemsize: int
    placed: Placed | None = None
    sources: tuple[int, ...] = ()
    weights: tuple[str, ...] = ()
    module_path: str = ""
    target: Any = None
    op: str = ""
    view: bool = False
    rectified: bool = False
    reduction: Reduction | None = None
    parts: tuple[str, ...] = ()
    weight_bytes: int = 0
    begin: tuple[int, int] = (0, 0)

    @cached_property
    def pixel_bytes(self) -> int:
        """Bytes of one position of the map, over all other dimensions."""
        return self.bytes // (self.extent[0] * self.extent[1])

    @property
    def extent(self) -> tuple[int, int]:
        """Height and width of the map."""
        return self.shape[self.axes.rows], self.shape[self.axes.cols]

    @property
    def facts(self) -> Op:
        """Return the facts about the operation that computes the map."""
        return Op() if self.placed is None else self.placed.op

    @property
    def bytes(self) -> int:
        """Bytes of the whole map."""
        return 0 if self.reduction is not None else torch.Size(self.shape).numel() * self.itemsize

    def tile_shape(self, height: int, width: int) -> tuple[int, ...]:
        """The shape of a tile of the map."""
        shape = list(self.shape)
        shape[self.axes.rows], shape[self.axes.cols] = height, width
        return tuple(shape)

    def check_tile(self, tile: torch.Tensor, height: int, width: int) -> None:
        """Raise RuntimeError if a rule has made another shape than planned, which would give wrong numbers downstream."""
        planned = self.tile_shape(height, width)
        if tuple(tile.shape) != planned:
            raise RuntimeError(
                f"{self.op} in layer '{self.module_path}' made a tile of shape {tuple(tile.shape)} where {planned} was "
                "planned. This is a fault of Widefield: please report it with the model."
            )

    def flow(self, axis: int) -> Flow:
        """The value along rows (axis 0) or columns (axis 1)."""
        maps = () if self.placed is None else tuple(read.cols if axis else read.rows for read in self.placed.reads)
        return Flow(self.shape[self.axes[axis]], self.sources, maps, self.facts.waits)


@dataclass(frozen=True)
class Stage:
    """The work of one scan: maps and operands in, maps and reductions out.

    `values` are in topological order, stage inputs first; `inputs`, `outputs` and `reductions` are indices into them. Inputs
    are the image, other maps that are given, maps that earlier stages have left, and weights as large as the image. `operands`
    names what is used and is no map: weights, and what plain operations make of reductions. `stored` are the outputs that only
    later stages read: they may live in host memory or in a file.
    """

    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    reductions: tuple[int, ...]
    operands: tuple[str, ...]
    stored: frozenset[int]

    @property
    def extent(self) -> tuple[int, int]:
        """Height and width of the largest input, in which tiles are measured."""
        inputs = [self.values[v] for v in self.inputs]
        return max(v.shape[v.axes.rows] for v in inputs), max(v.shape[v.axes.cols] for v in inputs)

    @cached_property
    def weight_sizes(self) -> tuple[int, ...]:
        """Bytes of the weights of each value that has some."""
        return tuple(value.weight_bytes for value in self.values if value.weight_bytes)

    @property
    def made(self) -> tuple[str, ...]:
        """Names of what leaves the stage: maps, then the parts of the reductions."""
        parts = [part for v in self.reductions for part in self.values[v].parts]
        return (*(self.values[v].name for v in self.outputs), *parts)


@dataclass(frozen=True, eq=False)
class Program:
    """A captured module as `items` to execute in order; see the module's docstring.

    `broadcast` maps the name of a stage input that is a weight as large as the image to the weight's name. `statistics` lists the
    batch norm layers that normalise by the batch: module path, name of its statistics. `refused` are the operations that run whole;
    `streamed_fraction` is the share of the activation bytes that does not. `divisions` make the same program with its one stage cut
    in two at a narrow map, from the first such map to the last, `waists` with one cut around its deep part; `thinner`
    gives those that keep fewer maps between stages, and compute more of them again, the more the later. `plain_bytes` is what all
    plain operations make of the image, small tails included, `combined_bytes` what they make of weights alone; `weight_bytes` are
    those of all weights that stages use, `plain_weight_bytes` those that only plain operations on what depends on the image do.
    `random`: masks are drawn. `kind` says what it was made for, but for the image's height and width. `planners` are those that
    were made for it, by what was asked of them.
    """

    captured: Captured
    items: tuple[Node | Stage, ...]
    broadcast: dict[str, str]
    statistics: tuple[tuple[str, str], ...]
    streamed_fraction: float
    plain_bytes: int
    combined_bytes: int
    weight_bytes: int
    plain_weight_bytes: int
    cast_bytes: int
    refused: tuple[UnsupportedOpError, ...]
    random: bool
    kind: Any = None
    divisions: "tuple[Callable[[], Program], ...]" = ()
    waists: "tuple[Callable[[], Program], ...]" = ()
    thinner: "Callable[[], Sequence[Callable[[], Program]]]" = tuple
    planners: dict[Any, Any] = field(default_factory=dict, init=False)

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(item for item in self.items if isinstance(item, Stage))

    @cached_property
    def final_maps(self) -> frozenset[str]:
        """Names of the maps among the results."""
        made = {stage.values[v].name for stage in self.stages for v in stage.outputs}
        return frozenset(leaf.name for leaf in self.captured.outputs if isinstance(leaf, Ref) and leaf.name in made)

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of the maps that leave the program."""
        return sum(stage.values[v].bytes for stage in self.stages for v in stage.outputs if v not in stage.stored)

    @cached_property
    def stored_maps(self) -> frozenset[str]:
        """Names of the maps that only stages read."""
        return frozenset(stage.values[v].name for stage in self.stages for v in stage.stored)

    @cached_property
    def read_output_bytes(self) -> int:
        """Bytes of those maps that leave the program and are read by later stages, which make a gradient of each."""
        read = {stage.values[v].name for stage in self.stages for v in stage.inputs}
        left = (stage.values[v] for stage in self.stages for v in stage.outputs if v not in stage.stored)
        return sum(value.bytes for value in left if value.name in read)

    @cached_property
    def repeated_weight_bytes(self) -> tuple[int, ...]:
        """Bytes, for each stage, of the weights of what an earlier stage computes, too."""
        seen, found = set[str](), list[int]()
        for stage in self.stages:
            found.append(sum(value.weight_bytes for value in stage.values if value.name in seen))
            seen.update(value.name for value in stage.values)
        return tuple(found)

    def map_bytes(self, training: bool, shares: Mapping[str, float] | None = None) -> int:
        """Bytes of the maps between stages that are there at a time; in training, with their gradients.

        A map goes when its last reader is done: the last stage that reads it, or in the backward pass the first one. Its gradient
        is there from the last stage that reads it to the one that makes it. Those of the image and of weights do not count.
        `shares`: how much is needed of each map, by its name; None: all.
        """
        made, sizes = dict[str, int](), dict[str, int]()
        read: dict[str, list[int]] = {}
        for s, stage in enumerate(self.stages):
            for v in stage.stored:
                name = stage.values[v].name
                made[name], sizes[name] = s, int(stage.values[v].bytes * (1.0 if shares is None else shares[name]))
            for v in stage.inputs:
                read.setdefault(stage.values[v].name, []).append(s)
        counts = [0] * len(self.stages)
        for name, size in sizes.items():
            readers = read[name]
            first, last = readers[0], readers[-1]
            for s in range(len(counts)):
                if training:
                    gradients = (made[name] <= s < last) + (s in readers)
                    counts[s] += size * ((s >= first) + gradients)
                elif made[name] <= s <= last:
                    counts[s] += size
        return max(counts, default=0)

    @cached_property
    def last_reads(self) -> tuple[tuple[str, ...], ...]:
        """For every item, the names of the tensors that no later item and no output reads."""
        seen = {leaf.name for leaf in self.captured.outputs if isinstance(leaf, Ref)}
        seen.update(name for _, name in self.statistics)
        result = []
        for item in reversed(self.items):
            reads = self.reads(item)
            result.append(tuple(reads - seen))
            seen |= reads
        return tuple(reversed(result))

    def reads(self, item: Node | Stage) -> set[str]:
        """Names of the tensors that an item reads."""
        if isinstance(item, Node):
            return set(item.refs)
        names = {item.values[v].name for v in item.inputs}
        return {*item.operands, *(self.broadcast.get(name, name) for name in names)}
