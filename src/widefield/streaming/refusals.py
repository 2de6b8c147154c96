"""Refusals, by name: of a capture (hidden operations, changes that forward makes), and of parts of an image."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as everywhere
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils import _pytree as pytree

from widefield.streaming.captured import CallKind, Captured, Node
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.need import Wanted
from widefield.streaming.program import Program
from widefield.streaming.rules.flipped import mirror
from widefield.streaming.rules.rolled import straight
from widefield.streaming.watch import Watch


def refuse_structure(module: nn.Module, batch_statistics: bool) -> None:
    """Refuse modules that hide their operations, and hooks on gradients."""
    for path, part in module.named_modules():
        if (found := _obstacle(part, batch_statistics)) is not None:
            raise UnsupportedOpError(path, *found)
    if torch.is_grad_enabled() and (everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks):
        raise UnsupportedOpError("", "a global backward hook", "would not run on tiles", "remove it (handle.remove())")


def has_backward_hooks(module: nn.Module) -> bool:
    """True if a hook waits for gradients of the module's layers, or of all modules."""
    hooks = [everywhere._global_backward_hooks, everywhere._global_backward_pre_hooks]
    hooks += [of for part in module.modules() for of in (part._backward_hooks, part._backward_pre_hooks)]
    return any(hooks)


def _obstacle(part: nn.Module, batch_statistics: bool) -> tuple[str, str, str] | None:
    """Return what cannot be streamed of a layer, why, and what to do instead; None if it can be."""
    name, home = type(part).__name__, type(part).__module__
    tracks = isinstance(part, _NormBase) and part.training and part.track_running_stats
    if batch_statistics and tracks and not isinstance(part, _BatchNorm):
        reason = "in training mode updates running statistics by those of each instance"
        return (
            name,
            reason,
            "put this instance norm layer in evaluation mode, or make it with track_running_stats=False",
        )
    if isinstance(part, torch.jit.ScriptModule):
        reason = "hides the operations of a scripted or traced module"
        return "TorchScript", reason, "stream the module that was scripted"
    if isinstance(part, (torch._dynamo.OptimizedModule, nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inside = "_orig_mod" if isinstance(part, torch._dynamo.OptimizedModule) else "module"
        return name, "is a wrapper around the module to stream", f"stream the module inside: model.{inside}"
    if ".quantized" in home or ".qat." in home or home.startswith("torchao"):
        return name, "computes with quantised tensors", "stream the float model, under autocast for speed"
    if torch.is_grad_enabled() and (part._backward_hooks or part._backward_pre_hooks):
        remedy = "remove it (handle.remove()) and use hooks on the image, outputs and parameters, or stream under torch.no_grad()"
        return "a backward hook of the module", "would not run on tiles, or once for each", remedy
    return None


def refuse_other_modes(graph: torch.fx.Graph, autocast: bool) -> None:
    """Refuse parts of forward under another grad mode or autocast state: inlining them would silently drop that state."""
    for fx in graph.nodes:
        if not isinstance(fx.target, torch._ops.HigherOrderOperator):
            continue
        if fx.target is torch.ops.higher_order.wrap_with_autocast and not autocast and not fx.args[2]:
            continue  # autocast switched off where it is off already
        region = next((node for node in graph.nodes if node.args and node.args[0] is fx), fx)
        remedy = "use .detach() on the result instead of no_grad, or move the region out of the streamed part"
        raise UnsupportedOpError(
            module_path(region), fx.target.__name__, "runs a part of forward in another mode", remedy
        )


def module_path(fx: torch.fx.Node) -> str:
    """Return the path of the layer that a node of a graph belongs to, "" for the module itself."""
    stack = fx.meta.get("nn_module_stack") or {}
    return next((str(path).removeprefix("module").removeprefix(".") for path, _ in reversed(stack.values())), "")


def refuse_changes(changes: list[tuple[str, list[Any]]], watch: Watch) -> None:
    """Refuse what forward changes outside of the module, but for entries added to a cache that do not depend on the image."""
    for what, values in changes:
        if any(map(watch.derived, pytree.tree_leaves(values))):
            reason = f"puts a tensor away in {what or 'a dict or set'}, outside of its result"
            remedy = "return the tensor, or assign it to an attribute of the module (self.features = ...)"
            raise UnsupportedOpError("", "forward", reason, remedy)
        if what:
            reason = f"changes {what}, so that the next forward pass may differ"
            remedy = "keep such state in an attribute of the module, draw with torch, or change it outside of forward"
            raise UnsupportedOpError("", "forward", reason, remedy)


def changes_buffer(key: str) -> UnsupportedOpError:
    """Return the error for a forward that updates a parameter or buffer, of which `key` is the key in the state_dict."""
    reason = f"changes the parameter or buffer '{key}' in forward, which a tile-by-tile pass would repeat"
    remedy = "put the layer in evaluation mode, or move the update out of forward"
    return UnsupportedOpError(key.rpartition(".")[0], "in-place update", reason, remedy)


def refuse_unknown_norms(module: nn.Module, captured: Captured) -> None:
    """Refuse norm layers of which torch.export gives a path that is none: no one would find their running statistics."""
    paths = {path for path, _ in module.named_modules(remove_duplicate=False)}
    for node in captured.nodes:
        if "batch_norm" in node.op and node.module_path not in paths:
            raise node.refuse(
                "belongs to a layer with several names, reached through a slice of layers",
                "give the layer one name, or take the layers one by one",
            )


def failed_capture(error: Exception, call: CallKind) -> Exception:
    """Return what to raise where torch.export failed: the model is wrong for such a call, or does what cannot be captured."""
    first_line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    if "is mutated in the forward method" in first_line:
        reason = "changes a tensor in forward that is neither made there nor a buffer of the model"
        remedy = "register it as a buffer; keep layers in an nn.ModuleList, and those that update themselves in evaluation mode"
        return UnsupportedOpError("", "in-place update", reason, remedy)
    if not type(error).__module__.startswith("torch."):  # not the capture but the model: a wrong channel count, say
        given = ", ".join((f"an image of shape {call.shape}", *(f"a map of shape {x.shape}" for x in call.map_inputs)))
        return ValueError(f"the model cannot run on {given}: {first_line:.300}")
    return UnsupportedOpError(
        "",
        "forward",
        f"could not be captured by torch.export ({type(error).__name__}: {first_line:.300})",
        "remove control flow that depends on pixel values (.item(), if x.max() > 0) from forward, "
        "or stream only the part of the model before it",
    )


def refuse_parts(program: Program, wanted: Wanted) -> None:
    """Raise ValueError if `program` cannot be computed for a part of the image, or with a mask for each image of a batch."""
    maps = {stage.values[v].name for stage in program.stages for v in stage.outputs}
    for node in program.items:
        if isinstance(node, Node) and (name := next((name for name in node.refs if name in maps), None)) is not None:
            reads = f"{node.op} in layer '{node.module_path}' reads the whole map '{name}'"
            why = program.refused[0] if program.refused else reads
            raise ValueError(f"a region or a mask needs a network that is streamed as a whole: {why}")
    if wanted.foreground is not None:
        for value in (value for stage in program.stages for value in stage.values if value.target is mirror):
            raise ValueError(
                f"a mask needs a network without flipped maps, and layer '{value.module_path}' flips its map"
            )
    if wanted.band[1] > 1:
        refuse_rolled_rows(program, "a process_group")
        if program.statistics and program.captured.synchronised:
            raise ValueError(
                "SyncBatchNorm takes the statistics of all processes, of which some share an image here: with process_group, "
                'batch_statistics="exact" needs BatchNorm2d, whose statistics are those of the whole image'
            )
    if wanted.foreground is not None and wanted.foreground.batch > 1:
        _refuse_mixed_images(program, wanted.foreground.batch)


def refuse_rolled_rows(program: Program, what: str) -> None:
    """Raise ValueError if the rows of a map among the results are not scanned in the order of the image, as `what` needs it."""
    for value in (stage.values[v] for stage in program.stages for v in stage.outputs):
        if value.target is straight and value.name in program.final_maps and value.begin[0]:
            raise ValueError(
                f"{what} needs results whose rows are computed in the order of the image: layer '{value.module_path}' rolls "
                f"its map, which begins with row {value.begin[0]}. One process computes such a map, and writes it to an array"
            )


def _refuse_mixed_images(program: Program, batch: int) -> None:
    """Raise ValueError if a mask has to be applied to a map of which it is not known where each of `batch` images stands."""
    # Names of the maps whose first dimension is known to be that of the images.
    by_image = {*program.captured.spatial_inputs, *program.broadcast}
    for stage in program.stages:
        for v, value in enumerate(stage.values):
            sources = [stage.values[s] for s in value.sources]
            same = all(source.name in by_image and len(source.shape) == len(value.shape) for source in sources)
            if sources and same and value.reduction is None and value.facts.keeps_batch and value.shape[0] == batch:
                by_image.add(value.name)
            masked = sources if value.reduction is not None or value.facts.masked else []
            masked += [value] if v in stage.outputs and value.name in program.final_maps else []
            for x in masked:
                if x.name not in by_image:
                    raise ValueError(
                        f"with a mask for each of {batch} images it must be known where each image stands in a map, and it is "
                        f"not behind {x.op} in layer '{x.module_path}': pass one image at a time"
                    )
