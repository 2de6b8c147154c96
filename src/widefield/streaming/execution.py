"""A program, executed on one image: scans, and plain operations before, between and after them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from widefield.streaming.buffers import in_channels_last
from widefield.streaming.captured import CAPTURE_DEVICE, Node, Ref
from widefield.streaming.foreground import broadcast_mask
from widefield.streaming.grid import Box
from widefield.streaming.heap import watch
from widefield.streaming.job import Job, Progress
from widefield.streaming.map_writing import MapOutput
from widefield.streaming.need import Wanted, cells_in
from widefield.streaming.plan import Plan
from widefield.streaming.planner import StagePlan
from widefield.streaming.program import Program, Stage, Value
from widefield.streaming.ranks import Ranks
from widefield.streaming.rules.random import dropped, drops, keep_mask
from widefield.streaming.scan import scan
from widefield.streaming.store import Store
from widefield.streaming.tiles import TileReader


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """A pass over one image, but for the tensors that its operations read."""

    program: Program
    plan: Plan
    stage_plans: Sequence[StagePlan]  # how each stage is scanned
    reader: TileReader  # where the image is read; a tensor is not detached yet
    wanted: Wanted | None  # the part of the image that is wanted; None: all of it
    statistics: "Statistics | None"  # results of the reductions, by an earlier pass; if it is empty, it is filled
    ranks: Ranks | None  # the processes that share the image
    bands: Mapping[str, Sequence[int]]  # how many rows of each output map, by its name, each of them has
    gather: bool  # put output maps together from these bands
    written: Mapping[str, MapOutput]  # output maps that go to a sink, by name
    replaced: frozenset[str]  # those that are kept nowhere else: in their place is an empty tensor
    store: Store  # where the maps between stages live
    carry_store: Store  # where carries are saved
    memory_budget: int | None  # bytes, within which the heap of the CPU is kept
    deterministic: bool  # run with deterministic algorithms only
    progress: Progress | None


def execute(given: Pass, tensors: dict[str, Any]) -> dict[str, Any]:
    """Run a program on an image by ordinary autograd; return what its outputs and statistics are made of, by name.

    `tensors` are parameters, buffers, constants and maps that forward takes besides the image (tensors, or images that are read
    lazily), by name; each goes when its last reader is done.
    """
    program, statistics = given.program, given.statistics
    seed, stage_plans = _seed(given), iter(given.stage_plans)
    make_job = _job_maker(given, seed)
    boxes: dict[str, Box] = {}  # the part that is made of each map that stages have left
    for item, last_reads in zip(program.items, program.last_reads, strict=True):
        if isinstance(item, Node):
            tensors[item.name] = _run(item, tensors, given.reader.device, seed)
        else:
            tensors.update(_run_stage(given, item, next(stage_plans), make_job, tensors, boxes))
            if statistics is not None:
                found = item.made[len(item.outputs) :]
                tensors.update(statistics.complete({name: tensors[name] for name in found}))
        for name in last_reads:
            tensors.pop(name, None)
    _keep_wanted(given, tensors, boxes)
    return tensors


def _seed(given: Pass) -> int:
    """Draw the seed of the random masks: the same in all processes, and in all passes that share their statistics."""
    seed = int(torch.randint(2**63 - 1, (), device="cpu").item()) if given.program.random else 0
    if given.ranks is not None:
        seed = given.ranks.everywhere(seed)[0]
    if given.statistics is not None:
        seed = given.statistics.seed = seed if given.statistics.seed is None else given.statistics.seed
    return seed


def _job_maker(given: Pass, seed: int) -> Callable[..., Job]:
    """Return a function that makes a `Job`, with all filled in that the scans of a pass have in common."""
    device, plan, heap = given.reader.device, given.plan, None
    if given.memory_budget is not None and device.type == "cpu":
        heap = watch(given.memory_budget, plan.predicted_bytes["step"], plan.total_bytes)
    autocast = torch.is_autocast_enabled(device.type)
    return partial(
        Job,
        foreground=given.reader.foreground,
        seed=seed,
        store=given.store,
        carry_store=given.carry_store,
        heap=heap,
        settings=partial(_settings, device.type, torch.get_autocast_dtype(device.type), autocast, given.deterministic),
        progress=given.progress,
        ranks=given.ranks,
    )


def _run_stage(
    given: Pass,
    stage: Stage,
    stage_plan: StagePlan,
    make_job: Callable[..., Job],
    tensors: Mapping[str, Any],
    boxes: dict[str, Box],
) -> dict[str, Tensor]:
    """Scan a stage; return what leaves it by name, and note in `boxes` the part that is made of each map."""
    readers, inputs = zip(*(_source(given, stage.values[v], tensors, boxes) for v in stage.inputs), strict=True)
    names = {v: stage.values[v].name for v in stage.outputs}
    job = make_job(
        grid=stage_plan.grid,
        readers=readers,
        weight_names=stage.operands,
        # Autocast gives pieces other dtypes.
        carry_sizes={} if torch.is_autocast_enabled(given.reader.device.type) else stage_plan.carry_sizes,
        recorded=stage_plan.recorded,
        written={v: given.written[name] for v, name in names.items() if name in given.written},
        replaced=frozenset(v for v, name in names.items() if name in given.replaced),
    )
    boxes.update({names[v]: box for v, box in job.boxes.items()})
    with job.settings():
        operands = [_in_format(tensors[name], given.reader.memory_format) for name in stage.operands]
        return dict(zip(stage.made, scan(job, inputs, operands), strict=True))


def _source(
    given: Pass, value: Value, tensors: Mapping[str, Any], boxes: Mapping[str, Box]
) -> tuple[TileReader, Tensor | None]:
    """Return the reader of a stage input, and the tensor behind it for autograd: of the image, of a map that an earlier stage has
    left or that was given, or of a weight as large as the image along an axis.
    """
    program, reader = given.program, given.reader
    if value.name != program.captured.image:
        data = tensors[program.broadcast.get(value.name, value.name)]
        if value.name in program.broadcast:
            data = data.reshape((1,) * (len(value.shape) - data.ndim) + tuple(data.shape))
        if value.name in (*program.broadcast, *program.captured.map_inputs):
            store = None
        else:  # what is a result as well has stayed on the device
            store = given.store if value.name in program.stored_maps else Store()
        origin = boxes.get(value.name, (0, 0))[:2]
        reader = TileReader(data, reader.device, value.dtype, dims=value.axes, store=store, origin=origin)
    if not isinstance(reader.data, Tensor):
        return reader, None
    return replace(reader, data=reader.data.detach()), reader.data


def _keep_wanted(given: Pass, tensors: dict[str, Any], boxes: Mapping[str, Box]) -> None:
    """Replace each map among the results by what is wanted of it."""
    program, wanted = given.program, given.wanted
    if wanted is None or not wanted.outputs:
        return
    for value in (stage.values[v] for stage in program.stages for v in stage.outputs):
        if value.name in program.final_maps - given.replaced:
            bands = given.bands.get(value.name)
            part = _wanted_part(tensors[value.name], value, boxes[value.name], wanted, program, bands)
            if given.ranks is not None and bands is not None and given.gather:
                part = given.ranks.gather(part, value.axes.rows, bands)
            tensors[value.name] = part


@dataclass
class Statistics:
    """Results of reductions over a whole image, by name, and the seed of the random masks in that pass."""

    reductions: dict[str, Tensor] = field(default_factory=dict)
    seed: int | None = None
    known: bool = False

    def complete(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what is known in place of what was `found`; or note it."""
        if not self.known:
            self.reductions.update(found)
        return {name: self.reductions[name] for name in found}


def _wanted_part(
    made: Tensor, value: Value, part: Box, wanted: Wanted, program: Program, bands: Sequence[int] | None
) -> Tensor:
    """Return the wanted part of an output map, of which `part` was made: the rest is zero, and so is the background.

    `bands`: the rows of it that each process has.
    """
    extent = value.shape[value.axes.rows], value.shape[value.axes.cols]
    image = program.captured.image_shape[2:]
    y, x, height, width = cells_in(wanted.region or (0, 0, *image), image, extent)  # type: ignore[arg-type]
    if bands is not None:
        y, height = y + sum(bands[: wanted.band[0]]), bands[wanted.band[0]]
    zeros = [0] * 2 * made.ndim  # to add before and after, of the last dimension first
    for axis, start, size, begin, length in zip(value.axes, (y, x), (height, width), part[:2], part[2:], strict=True):
        first = min(max(start, begin), begin + length)
        stop = max(first, min(start + size, begin + length))
        made = made.narrow(axis, first - begin, stop - first)
        before, after = min(first, start + size) - start, start + size - max(stop, start)
        at = 2 * (made.ndim - 1 - axis)
        zeros[at : at + 2] = max(before, 0), max(after, 0)
    made = nn.functional.pad(made, zeros) if any(zeros) else made
    if wanted.foreground is None:
        return made
    mask = wanted.foreground.tile(extent, y, x, height, width, made.device)
    return made.masked_fill(~broadcast_mask(mask, made.ndim, value.axes), 0)


def on_whole_maps(program: Program, inputs: Sequence[Tensor], tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run what was captured on whole maps: the last result of each layer by its path, "" for the first output."""
    found = {**tensors, **dict(zip(program.captured.spatial_inputs, inputs, strict=True))}
    made: dict[str, Tensor] = {}
    for node in program.captured.nodes:
        found[node.name] = _run(node, found, inputs[0].device, seed=0)
        names = node.module_path.split(".")
        made.update({".".join(names[:k]): found[node.name] for k in range(1, len(names) + 1)})
    made[""] = fill_refs(program.captured.outputs[:1], found)[0]
    return made


def _run(node: Node, tensors: Mapping[str, Any], device: torch.device, seed: int) -> Any:
    """One node outside of the scan, on whole tensors, by ordinary autograd.

    Masks of dropout are those of `seed`, so that all processes have the same, and all regions of a prepared image.
    """
    if drops(node):
        x = tensors[node.args[0].name]
        return dropped(x, node, seed, [0] * x.ndim)[node.pick or 0]
    if node.target is torch.ops.aten.bernoulli.p:  # stochastic depth, channel dropout: the same on every device
        like = tensors[node.args[0].name]
        return keep_mask(float(node.args[1]), seed, node.name, like.shape, [0] * like.ndim, like.device).to(like.dtype)
    args, kwargs = fill_refs((node.args, node.kwargs), tensors)
    args, kwargs = pytree.tree_map(
        lambda x: device if isinstance(x, torch.device) and x == CAPTURE_DEVICE else x, (args, kwargs)
    )
    result = node.target(*args, **kwargs)
    return result if node.pick is None else result[node.pick]


def fill_refs(structure: Any, tensors: Mapping[str, Any]) -> Any:
    """`structure` with every `Ref` replaced by what it names."""
    return pytree.tree_map(lambda leaf: tensors[leaf.name] if isinstance(leaf, Ref) else leaf, structure)


def convolution_weights(module: nn.Module) -> list[Tensor]:
    """The weights of convolutions."""
    return [p for p in module.parameters() if p.ndim == 4]


def memory_format(device: torch.device, dtype: torch.dtype, kernels: Sequence[Tensor]) -> torch.memory_format:
    """Channels last where convolutions are faster in it, and a strip of a map is one block of memory.

    They are on a CPU, and on a GPU in 16 bits and with large depthwise `kernels`, whose gradients take it tens of seconds
    otherwise; else a GPU has them as the model's owner has.
    """
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if device.type == "cpu":
        fast = dtype in (torch.float32, torch.bfloat16, torch.float16)
    else:
        fast = dtype.itemsize == 2 or any(in_channels_last(x) or (x.shape[1] == 1 and x.shape[3] > 3) for x in kernels)
    return torch.channels_last if fast else torch.contiguous_format


def _in_format(weight: Tensor, memory_format: torch.memory_format | None) -> Tensor:
    return weight.contiguous(memory_format=memory_format) if weight.ndim == 4 and memory_format else weight


@contextmanager
def _settings(device_type: str, autocast_dtype: torch.dtype, autocast: bool, deterministic: bool) -> Iterator[None]:
    """The settings of the forward pass, for a part of it or of its backward pass."""
    switched = _deterministic() if deterministic else nullcontext()
    with switched, torch.autocast(device_type, dtype=autocast_dtype, enabled=autocast):
        yield


_SWITCH = Lock()
# For each pass that is within it, how the switch was before (on, and only to warn): first of all as the user has it.
_switched: list[tuple[bool, bool]] = []


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic algorithms only: a switch of the whole process, which is put back when the last of its threads is through."""
    with _SWITCH:
        _switched.append(
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
        )
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        with _SWITCH:
            was, warned = _switched[0]
            _switched.pop()
            if not _switched:
                torch.use_deterministic_algorithms(was, warn_only=warned)
