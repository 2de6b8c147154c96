"""A program, executed on one image: scans, and plain operations before, between and after them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from widefield.streaming.buffers import in_channels_last
from widefield.streaming.captured import CAPTURE_DEVICE, Node, Ref
from widefield.streaming.foreground import broadcast_mask
from widefield.streaming.grid import Box
from widefield.streaming.heap import watch
from widefield.streaming.job import Job, Progress
from widefield.streaming.map_writing import MapOutput
from widefield.streaming.need import PartialGrid, Wanted, cells_in, rows_of_bands
from widefield.streaming.plan import Plan
from widefield.streaming.planner import StagePlan
from widefield.streaming.program import Program, Stage, Value
from widefield.streaming.ranks import Ranks
from widefield.streaming.rules.random import keep_mask
from widefield.streaming.scan import scan
from widefield.streaming.store import Store
from widefield.streaming.tiles import LazyImage, TileReader


def execute(
    program: Program,
    plan: Plan,
    stage_plans: Sequence[StagePlan],
    reader: TileReader,
    image_tensor: Tensor | None,
    values: dict[str, Any],
    *,
    wanted: Wanted | None,
    fill: tuple[float, ...],
    statistics: "Statistics | None",
    ranks: Ranks | None,
    gather: bool,
    written: Mapping[str, MapOutput],
    replaced: frozenset[str],
    memory_budget: int | None,
    scratch_dir: str | None,
    deterministic: bool,
    progress: Progress | None,
) -> dict[str, Any]:
    """Run `program` on the image of `reader` by ordinary autograd; return what its outputs and statistics are made of, by name.

    Args:
        program: scans and plain operations.
        plan: where maps and carries live.
        stage_plans: how each stage is scanned.
        reader: where the image is read.
        image_tensor: the tensor behind it, for autograd; None for an image that is read lazily.
        values: parameters, buffers, constants and maps that forward takes besides the image (tensors, or images that are read
            lazily), by name; each goes when its last reader is done.
        wanted: the part of the image that is wanted; None: all of it.
        fill: the pixel that takes the place of the background.
        ranks: the processes that share the image.
        gather: put output maps together from the bands of all processes.
        written: output maps that go to a sink, by name.
        replaced: names of those that are kept nowhere else: in their place is an empty tensor.
        statistics: results of the reductions, by an earlier pass over the image. If it is empty, it is filled.
        memory_budget: bytes, within which the heap of the CPU is kept.
        scratch_dir: folder for files; None: the system's.
        deterministic: run with deterministic algorithms only.
        progress: called as progress(phase, steps done, steps of the scan).
    """
    device = reader.device
    autocast = torch.is_autocast_enabled(device.type)
    settings = partial(_settings, device.type, torch.get_autocast_dtype(device.type), autocast, deterministic)
    seed = int(torch.randint(2**63 - 1, (), device="cpu").item()) if program.random else 0
    if ranks is not None:
        seed = ranks.everywhere(seed)[0]
    if statistics is not None:
        seed = statistics.seed = seed if statistics.seed is None else statistics.seed
    foreground = None if wanted is None else wanted.foreground
    parts: dict[str, Box] = {}  # of the maps that stages have left
    store = Store(plan.map_place, scratch_dir)
    heap = None
    if memory_budget is not None and device.type == "cpu":
        heap = watch(memory_budget, plan.predicted_bytes["allocator"] * 3 // 4, plan.total_bytes)

    def reader_of(value: Value) -> tuple[TileReader, Tensor | None]:
        if value.name == program.captured.image:
            return replace(reader, channels=value.shape[1], foreground=foreground, fill=fill), image_tensor
        data, given = _stage_input(program, value, values), {*program.broadcast, *program.captured.maps}
        tensor = data if isinstance(data, Tensor) else None
        origin = parts.get(value.name, (0, 0))[:2]
        return TileReader(
            data if tensor is None else tensor.detach(),
            device,
            value.dtype,
            dims=value.axes,
            store=None if value.name in given else store,
            origin=origin,
        ), tensor

    def run_stage(stage: Stage, plan_of_stage: StagePlan) -> tuple[Tensor, ...]:
        readers, inputs = zip(*(reader_of(stage.values[v]) for v in stage.inputs), strict=True)
        job = Job(
            grid=plan_of_stage.grid,
            foreground=foreground,
            readers=readers,
            weight_names=stage.operands,
            seed=seed,
            store=store,
            carry_store=Store(plan.carry_place, scratch_dir),
            carry_sizes={} if autocast else plan_of_stage.carry_sizes,  # autocast gives pieces other dtypes
            recorded=plan_of_stage.recorded,
            heap=heap,
            settings=settings,
            progress=progress,
            ranks=ranks,
            written={v: written[stage.values[v].name] for v in stage.outputs if stage.values[v].name in written},
            replaced=frozenset(v for v in stage.outputs if stage.values[v].name in replaced),
        )
        parts.update({stage.values[v].name: box for v, box in job.parts.items()})
        with settings():
            return scan(job, inputs, [_in_format(values[name], reader.memory_format) for name in stage.operands])

    remaining = iter(stage_plans)
    for item, last_reads in zip(program.items, program.last_reads, strict=True):
        if isinstance(item, Node):
            values[item.name] = _run(item, values, device, seed)
        else:
            values.update(zip(item.made, run_stage(item, next(remaining)), strict=True))
            if statistics is not None:
                found = item.made[len(item.outputs) :]
                values.update(statistics.complete({name: values[name] for name in found}))
        for name in last_reads:
            values.pop(name, None)
    if wanted is not None and wanted.outputs:
        grids = [each.grid.whole for each in stage_plans if isinstance(each.grid, PartialGrid)]
        for value in (stage.values[v] for stage in program.stages for v in stage.outputs):
            if value.name in program.final_maps - replaced:
                bands = None if ranks is None else rows_of_bands(program, grids, wanted, value.name)
                part = _wanted_part(values[value.name], value, parts[value.name], wanted, program, bands)
                if ranks is not None and bands is not None and gather:
                    part = ranks.gather(part, value.axes.rows, bands)
                values[value.name] = part
    return values


@dataclass
class Statistics:
    """Results of reductions over a whole image, by name, and the seed of the random masks in that pass."""

    values: dict[str, Tensor] = field(default_factory=dict)
    seed: int | None = None
    known: bool = False

    def complete(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what is known in place of what was `found`; or note it."""
        if not self.known:
            self.values.update(found)
        return {name: self.values[name] for name in found}


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
    box = y, x, height, width
    for axis, start, size, begin, length in zip(value.axes, box[:2], box[2:], part[:2], part[2:], strict=True):
        first = min(max(start, begin), begin + length)
        stop = max(first, min(start + size, begin + length))
        zeros = list(made.shape)
        pieces = [made.narrow(axis, first - begin, stop - first)]
        for at, missing in ((0, min(first, start + size) - start), (1, start + size - max(stop, start))):
            zeros[axis] = missing
            if missing > 0:
                pieces.insert(at * len(pieces), made.new_zeros(zeros))
        made = pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)
    if wanted.foreground is None:
        return made
    mask = wanted.foreground.tile(extent, y, x, height, width, made.device)
    return torch.where(broadcast_mask(mask, made.ndim, value.axes), made, 0)


def on_whole_maps(program: Program, inputs: Sequence[Tensor], values: dict[str, Any]) -> dict[str, Tensor]:
    """Run what was captured on whole maps: the last result of each layer by its path, "" for the first output."""
    values = {**values, **dict(zip(program.captured.spatial_inputs, inputs, strict=True))}
    made: dict[str, Tensor] = {}
    for node in program.captured.nodes:
        values[node.name] = _run(node, values, inputs[0].device, seed=0)
        names = node.module_path.split(".")
        made.update({".".join(names[:k]): values[node.name] for k in range(1, len(names) + 1)})
    made[""] = fill_refs(program.captured.outputs[:1], values)[0]
    return made


def _run(node: Node, values: dict[str, Any], device: torch.device, seed: int) -> Any:
    """One node outside of the scan, on whole tensors, by ordinary autograd."""
    if node.target is torch.ops.aten.bernoulli.p:  # stochastic depth, channel dropout: the same on every device
        like = values[node.args[0].name]
        return keep_mask(float(node.args[1]), seed, node.name, like.shape, [0] * like.ndim, like.device).to(like.dtype)
    args, kwargs = fill_refs((node.args, node.kwargs), values)
    args, kwargs = pytree.tree_map(
        lambda x: device if isinstance(x, torch.device) and x == CAPTURE_DEVICE else x, (args, kwargs)
    )
    result = node.target(*args, **kwargs)
    return result if node.pick is None else result[node.pick]


def _stage_input(program: Program, value: Value, values: dict[str, Any]) -> Tensor | LazyImage:
    """A stage input: a map that an earlier stage has left or that was given, or a weight as large as the image along an axis."""
    if value.name not in program.broadcast:
        return values[value.name]
    weight = values[program.broadcast[value.name]]
    return weight.reshape((1,) * (len(value.shape) - weight.ndim) + tuple(weight.shape))


def fill_refs(structure: Any, values: dict[str, Any]) -> Any:
    """`structure` with every `Ref` replaced by its value."""
    return pytree.tree_map(lambda leaf: values[leaf.name] if isinstance(leaf, Ref) else leaf, structure)


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
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if deterministic:
            torch.use_deterministic_algorithms(True)
        with torch.autocast(device_type, dtype=autocast_dtype, enabled=autocast):
            yield
    finally:
        if deterministic:
            torch.use_deterministic_algorithms(was, warn_only=warned)
