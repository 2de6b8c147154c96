"""From a captured module to a program, in passes. Each is a function of a graph that gives a graph, and every graph can be printed.

capture       the operations as torch.export gives them, for one image size
fold          batch norms by stored statistics are folded into the convolution before them
normal form   operators that differ only in how they are written become one
place         each operation becomes a map, a reduction over the whole image, or a plain operation
live          what no output needs is dropped
levels        by which scan a map can be computed: local operations keep the level, what a reduction gives is one level up
kept          which maps live from one scan to later ones
stages        the maps of a level are computed by one scan
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial

import torch

from widefield.streaming.autocast import Autocast
from widefield.streaming.captured import Captured, Node
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.fold import fold_batch_norms
from widefield.streaming.kept import Scans, is_view, size_of
from widefield.streaming.local import LocalCall
from widefield.streaming.memory_model import MemoryModel
from widefield.streaming.normal_form import normal_form, taken_apart
from widefield.streaming.placing import Placing
from widefield.streaming.program import Program, Stage
from widefield.streaming.rules import Maps, Placed, Reduction, op_of
from widefield.streaming.rules.norms import statistics_of_batch, statistics_of_tensor
from widefield.streaming.rules.rewriting import parts_of
from widefield.streaming.stages import make_stages, weight_size

_OF_BATCH = (statistics_of_batch, statistics_of_tensor)
_SAMPLING = ("aten.grid_sampler", "torchvision.deform_conv2d")


@dataclass(frozen=True)
class Graph:
    """A forward pass on its way to a program; what later passes make is empty before.

    `nodes` are in the order in which they are computed, those in `placed` are maps and reductions. `outputs` stand for the results.
    `levels` are those of nodes and of the parts of reductions: the scan that can compute each, `stages` the scans by level. What
    reads a map of `divided_at` is in a later scan. `kept` are the maps that live between scans. `computed` are dtypes under
    autocast. `whole` are plain nodes that depend on a whole map, because of the operations `refused`.
    """

    captured: Captured
    nodes: tuple[Node, ...]
    outputs: Node
    maps: Maps = field(default_factory=Maps)
    placed: Mapping[str, Placed] = field(default_factory=dict)
    refused: tuple[UnsupportedOpError, ...] = ()
    whole: frozenset[str] = frozenset()
    levels: Mapping[str, int] = field(default_factory=dict)
    stages: Mapping[int, Stage] = field(default_factory=dict)
    divided_at: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    computed: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def plain(self) -> list[Node]:
        """The plain operations."""
        return [node for node in self.nodes if node.name not in self.placed]

    @property
    def streamed(self) -> list[Node]:
        """The maps and reductions."""
        return [node for node in self.nodes if node.name in self.placed]

    @property
    def scans(self) -> Scans:
        """All that scans compute, to be divided among them."""
        wanted = {name for node in (*self.plain, self.outputs) for name in node.refs if name in self.maps}
        given = self.captured.spatial_inputs
        return Scans(self.maps, given, self.streamed, self.placed, self.levels, wanted)

    @property
    def ends(self) -> set[str]:
        """Names of maps with which a scan ends, so that they are not computed again when what follows is."""
        frozen = {node.name for node in self.nodes if isinstance(node.target, LocalCall) and node.target.frozen}
        return frozen | self.divided_at

    @property
    def cast(self) -> dict[str, torch.dtype]:
        """The dtypes of the copies that autocast makes of weights."""
        dtypes, found = self.dtypes, dict[str, torch.dtype]()
        for node in self.streamed:
            if (dtype := self.computed.get(node.name)) is None:
                continue
            for name in node.refs:
                if name not in self.maps and dtype.itemsize < dtypes.get(name, dtype).itemsize:
                    found[name] = dtype
        return found

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every value."""
        given = {name: dtype for name, (_, dtype) in self.captured.shapes.items()}
        return given | {node.name: node.dtype for node in self.nodes}

    def __str__(self) -> str:
        """One line for each node."""
        rows = [self._row(node) for node in self.nodes]
        widths = [max((len(row[k]) for row in rows), default=0) for k in range(len(rows[0]) if rows else 0)]
        return "\n".join("  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def _row(self, node: Node) -> tuple[str, ...]:
        kind = "reduction" if isinstance(node.target, Reduction) else "map" if node.name in self.placed else "plain"
        level = f"level {self.levels[node.name]}" if self.levels.get(node.name) else ""
        op = type(node.target).__name__ if isinstance(node.target, Reduction) else node.op
        shape = " x ".join(map(str, node.shape))
        return node.name, op, shape, kind if self.placed else "", level, node.module_path


def build(captured: Captured, *, allow_whole: bool, autocast: Autocast | None = None) -> Program:
    """Make a program. What cannot be streamed runs on whole maps if `allow_whole`, else raises `UnsupportedOpError`.

    `autocast` is that which it will run under.
    """
    *_, (_, graph) = passes(captured, allow_whole=allow_whole, autocast=autocast)
    program = _program(graph)
    if len(program.stages) > 1:
        return replace(program, thinner=cache(partial(_thinner, graph)))
    if any(isinstance(node.target, LocalCall) for node in graph.nodes):
        return program  # what a window costs is not known as that of other operations is
    narrow = [frozenset({name}) for name in graph.scans.narrow()]
    around = [cut for cut in graph.scans.waists() if cut not in narrow]
    divisions, waists = (tuple(partial(_divided, graph, cut) for cut in cuts) for cuts in (narrow, around))
    return replace(program, divisions=divisions, waists=waists)


def _divided(graph: Graph, cut: frozenset[str]) -> Program:
    """The program with a scan of its own for what follows from each map of `cut`."""
    return _program(_stages(_kept(_levels(replace(graph, divided_at=cut)))))


def _thinner(graph: Graph) -> list[Callable[[], Program]]:
    """Programs that keep fewer maps between scans, and compute more of them again."""
    work: dict[str, float] = {}
    for stage in graph.stages.values():
        for value, each in zip(stage.values, MemoryModel(stage, graph.captured.image).work.tolist(), strict=True):
            if value.placed is not None:
                work[value.name] = each * value.extent[0] * value.extent[1]
    choices = graph.scans.thinner(work, graph.ends)
    return [cache(partial(_program_keeping, graph, kept)) for kept in choices]


def _program_keeping(graph: Graph, kept: frozenset[str]) -> Program:
    return _program(_stages(replace(graph, kept=kept)))


def passes(captured: Captured, *, allow_whole: bool, autocast: Autocast | None = None) -> Iterator[tuple[str, Graph]]:
    """Each pass by name, with the graph that it made, in the order of the module's docstring."""
    outputs = Node("", tuple, captured.outputs, {}, (), torch.float32)  # no operation, but it reads what is returned
    graph = Graph(captured=captured, nodes=captured.nodes, outputs=outputs)
    yield "capture", graph
    functions: dict[str, Callable[[Graph], Graph]] = {
        "fold": lambda graph: replace(graph, nodes=fold_batch_norms(graph.captured)),
        "normal form": _normal_form,
        "place": partial(_place, allow_whole=allow_whole, autocast=autocast),
        "live": _live,
        "levels": _levels,
        "kept": _kept,
        "stages": partial(_stages, autocast=autocast),
    }
    for name, function in functions.items():
        graph = function(graph)
        yield name, graph


def explain(captured: Captured, *, allow_whole: bool) -> str:
    """Return what each pass made: the lines that are new in its graph, and the stages at the end."""
    text, before = [], set[str]()
    for name, graph in passes(captured, allow_whole=allow_whole):
        lines = str(graph).splitlines()
        changed = [line for line in lines if " ".join(line.split()) not in before]
        text += [
            f"{name}: {len(lines)} operations, {len(changed)} of them new or changed",
            *(f"  {x}" for x in changed),
        ]
        before = {" ".join(line.split()) for line in lines}
    for level, stage in sorted(graph.stages.items()):
        inputs = [stage.values[v].name for v in stage.inputs]
        text.append(f"stage {level}: from {', '.join(inputs)} to {', '.join(stage.made)}, by way of")
        text.append("  " + ", ".join(value.name for value in stage.values if value.placed is not None))
    return "\n".join(text)


def _normal_form(graph: Graph) -> Graph:
    shapes = {name: shape for name, (shape, _) in graph.captured.shapes.items()}
    shapes |= {node.name: node.shape for node in graph.nodes}
    of_image, nodes, dtypes = set(graph.captured.spatial_inputs), list[Node](), graph.dtypes
    for node in graph.nodes:
        parts = taken_apart(node, shapes, dtypes) if of_image.intersection(node.refs) else (node,)
        of_image |= {node.name} if of_image.intersection(node.refs) else set()
        shapes |= {part.name: part.shape for part in parts}
        nodes += [normal_form(part, shapes) for part in parts]
    return replace(graph, nodes=tuple(nodes))


def _place(graph: Graph, allow_whole: bool, autocast: Autocast | None = None) -> Graph:
    computed: Mapping[str, torch.dtype] = {}
    if autocast is not None and any(
        node.op in _SAMPLING for node in graph.nodes
    ):  # for whose bounds alone dtypes matter here
        computed = autocast.dtypes(graph.nodes, graph.captured.shapes)
    placing = Placing(graph.captured, allow_whole=True, computed=computed)
    for node in graph.nodes:
        placing.add(node)
    if placing.refused and (placing.read_as_maps or not allow_whole):
        placing = Placing(graph.captured, allow_whole, computed, weights_as_maps=False)
        for node in graph.nodes:
            placing.add(node)
    outputs = placing.unflattened(graph.outputs)
    return replace(
        graph,
        nodes=tuple(placing.nodes.values()),
        outputs=outputs,
        maps=placing.maps,
        placed=placing.placed,
        refused=tuple(placing.refused),
        whole=frozenset(placing.whole),
    )


def _live(graph: Graph) -> Graph:
    needed, live = set(graph.outputs.refs), []
    for node in reversed(graph.nodes):
        parts = parts_of(node) if isinstance(node.target, Reduction) else (node.name,)
        if not needed.isdisjoint(parts):
            needed.update(graph.maps.broadcast.get(name, name) for name in node.refs)
            live.append(node)
    graph = replace(graph, nodes=tuple(live[::-1]))
    if all(map(is_view, graph.streamed)):
        first = graph.refused[0] if graph.refused else None
        reason = "is the first operation on the image, so that nothing is left to stream"
        remedy = "run this model as it is, without streaming"
        raise UnsupportedOpError(first.module_path if first else "", first.op if first else "forward", reason, remedy)
    return graph


def _levels(graph: Graph) -> Graph:
    levels: dict[str, int] = {}
    ends = graph.ends
    for node in graph.nodes:
        # A plain operation comes after the scan that computes a map which it reads.
        after = (
            levels.get(name, 0) + (name in ends or (name in graph.maps and node.name not in graph.placed))
            for name in node.refs
        )
        levels[node.name] = max(after, default=0)
        if isinstance(node.target, Reduction):
            levels.update(dict.fromkeys(parts_of(node), levels[node.name] + 1))
    return replace(graph, levels=levels)


def _kept(graph: Graph) -> Graph:
    return replace(graph, kept=frozenset(graph.scans.crossing()))


def _stages(graph: Graph, autocast: Autocast | None = None) -> Graph:
    if autocast is not None:
        graph = replace(graph, computed=autocast.dtypes(graph.nodes, graph.captured.shapes))
    return replace(graph, stages=make_stages(graph.scans, graph.kept, graph.dtypes, graph.computed))


def _program(graph: Graph) -> Program:
    maps, levels = graph.maps, graph.levels
    plain = graph.plain
    items: list[Node | Stage] = []
    for level in range(max(levels.values()) + 1):
        items += [node for node in plain if levels[node.name] == level]
        items += [graph.stages[level]] if level in graph.stages else []
    used = {name for stage in graph.stages.values() for name in stage.operands}
    of_image = [node for node in plain if levels[node.name] > 0]
    plain_weights = {name for node in of_image for name in node.refs if name in graph.captured.bound} - used
    repeated = {name for name, placed in graph.placed.items() if placed.op.repeats}
    extents = {maps.extent(name) for name in maps.axes if name not in repeated} - {(1, 1)}
    whole = sum(size_of(node) for node in of_image if _is_whole(node, graph.whole, extents))
    made = [n for n in graph.streamed if not isinstance(n.target, Reduction) and n.name not in repeated]
    streamed = sum(map(size_of, made))
    dtypes, cast = graph.dtypes, graph.cast
    return Program(
        captured=replace(graph.captured, outputs=graph.outputs.args),
        items=tuple(items),
        broadcast=dict(maps.broadcast),
        statistics=tuple((node.module_path, node.name) for node in graph.nodes if node.target in _OF_BATCH),
        streamed_fraction=streamed / max(1, streamed + whole),
        plain_bytes=sum(map(size_of, of_image)),
        combined_bytes=sum(size_of(node) for node in plain if levels[node.name] == 0),
        weight_bytes=sum(weight_size(name, maps, dtypes) for name in used),
        plain_weight_bytes=sum(weight_size(name, maps, dtypes) for name in plain_weights),
        cast_bytes=sum(weight_size(name, maps, cast) for name in used if name in cast),
        refused=graph.refused,
        random=any(map(_draws, graph.nodes)),
    )


def _draws(node: Node) -> bool:
    """True if a node takes random numbers."""
    if isinstance(node.target, LocalCall):
        return node.target.cost.draws
    op = op_of(node.target)
    return op is not None and op.draws


def _is_whole(node: Node, whole: frozenset[str], extents: set[tuple[int, int]]) -> bool:
    """True if a plain node depends on a whole map, or has one of these `extents` of what scans have reduced."""
    return node.name in whole or any(
        height * width in node.shape or (height, width) in itertools.pairwise(node.shape) for height, width in extents
    )
