"""A pass of a streamed module over an image: its weights bound, the program executed, the result put together."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from widefield.streaming.call import Inputs
from widefield.streaming.execution import Pass, Statistics, convolution_weights, execute, fill_refs, memory_format
from widefield.streaming.fingerprint import NOTHING, mark_left
from widefield.streaming.foreground import parse_fill
from widefield.streaming.map_writing import NOTHING_WRITTEN, Writing
from widefield.streaming.need import PartialGrid, rows_of_bands
from widefield.streaming.planner import Planner
from widefield.streaming.program import Program
from widefield.streaming.rules.norms import update_running_statistics
from widefield.streaming.shared_writing import split_writing
from widefield.streaming.store import Store
from widefield.streaming.tiles import TileReader, pixel_dtype, read_whole

if TYPE_CHECKING:
    from widefield.streaming.module import StreamingCNN


def run(
    network: "StreamingCNN",
    planner: Planner,
    inputs: Inputs,
    statistics: Statistics | None = None,
    writing: Writing = NOTHING_WRITTEN,
) -> Any:
    """Return the result for an image, or a part of it, with what `writing` says written in the place of maps."""
    module, ranks, image, kind, wanted = network.module, network.ranks, inputs.image, inputs.kind, inputs.wanted
    plan, stage_plans = planner.plan(wanted)
    program, bands = planner.program, dict[str, list[int]]()
    if ranks is not None and wanted is not None and wanted.outputs:
        grids = [each.grid.whole for each in stage_plans if isinstance(each.grid, PartialGrid)]
        bands = rows_of_bands(program, grids, wanted)
        if writing.outputs:
            writing = split_writing(writing, ranks, bands, network.scratch_dir)
    reader = TileReader(
        image,
        kind.device,
        kind.dtype,
        network.normalisation,
        memory_format=memory_format(kind.device, kind.dtype, convolution_weights(module)),
        channels=kind.shape[1],
        foreground=None if wanted is None else wanted.foreground,
        fill=parse_fill(inputs.fill, kind.shape[1], pixel_dtype(image)),
    )
    map_inputs = dict(zip(program.captured.map_inputs, inputs.map_inputs, strict=True))
    with writing.begin(image) as written:
        given = Pass(
            program=program,
            plan=plan,
            stage_plans=stage_plans,
            reader=reader,
            wanted=wanted,
            statistics=statistics if inputs.prepared is None else inputs.prepared.statistics,
            ranks=ranks,
            bands=bands,
            gather=inputs.gather or network.gather,
            written=written,
            replaced=writing.replaced,
            store=Store(plan.map_place, network.scratch_dir, None if torch.is_grad_enabled() else []),
            carry_store=Store(plan.carry_place, network.scratch_dir),
            memory_budget=network.memory_budget,
            deterministic=network.deterministic,
            progress=network.progress,
        )
        tensors = execute(given, {**bind(module, program, kind.device), **map_inputs})
    return _result(module, program, tensors, {name: output.place for name, output in written.items()})


def run_plain(network: "StreamingCNN", inputs: Inputs) -> Any:
    """Run the plain module on a whole image, its norm layers as they are when it is streamed."""
    device, dtype = inputs.kind.device, inputs.kind.dtype
    maps = [read_whole(x, given, device) for x, given in zip(inputs.map_inputs, inputs.kind.map_inputs, strict=True)]
    pixels = TileReader(inputs.image, device, dtype, network.normalisation).read(0, 0, *inputs.kind.shape[2:])
    frozen = [part for part in network.frozen_norms if part.training]
    try:
        for part in frozen:
            part.training = False
        return network.module(network.normalisation.apply(pixels, dtype), *maps)
    finally:
        for part in frozen:
            part.training = True


def bind(module: nn.Module, program: Program, device: torch.device) -> dict[str, Any]:
    """The parameters and buffers of `module` as they are now, by the names that the captured program uses."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    tensors.update(module.named_buffers(remove_duplicate=False))
    if torch.is_grad_enabled():
        learned = [key for key in set(program.captured.bound.values()) if tensors[key].requires_grad]
        tensors.update(zip(learned, _Together.apply(*(tensors[key] for key in learned)), strict=True))
    bound: dict[str, Any] = {name: tensors[key] for name, key in program.captured.bound.items()}
    bound.update({name: tensor.to(device) for name, tensor in program.captured.constants.items()})
    return bound


def _result(module: nn.Module, program: Program, tensors: dict[str, Any], written: dict[str, Any]) -> Any:
    """Return the result, made of `tensors`, with what is `written` in the place of maps.

    Running statistics, and attributes that forward sets, are as the plain module leaves them.
    """
    for path, name in program.statistics:
        update_running_statistics(module.get_submodule(path), tensors[name])
    outputs, spec = program.captured.outputs, program.captured.spec
    attributes = pytree.tree_unflatten(fill_refs(outputs, tensors), spec)[1]
    result = pytree.tree_unflatten(fill_refs(outputs, {**tensors, **written}), spec)[0]
    for (path, name, read), value in zip(program.captured.attributes, attributes, strict=True):
        part = module.get_submodule(path)
        setattr(part, name, value if read else mark_left(value, before=vars(part).get(name, NOTHING)))
    return result


class _Together(torch.autograd.Function):
    """The same tensors, whose gradients arrive all at once: a backward pass that fails has changed none of them."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads
