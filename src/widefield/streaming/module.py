"""The module that users hold: a network that streams the images it is called on."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widefield.streaming.budget import parse_bytes, parse_tile_size
from widefield.streaming.call import (
    Inputs,
    PreparedImage,
    check_inputs,
    device_and_dtype,
    in_band,
    kind_of_call,
    parse_wanted,
    state_of,
)
from widefield.streaming.captured import CallKind, Ref
from widefield.streaming.drafts import PlanRequest
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.execution import Statistics, convolution_weights, memory_format
from widefield.streaming.foreground import parse_mask
from widefield.streaming.image_lists import results_of_each
from widefield.streaming.job import Progress
from widefield.streaming.layers import cells_of
from widefield.streaming.map_writing import Writing, plan_writing
from widefield.streaming.need import Wanted
from widefield.streaming.plan import Plan
from widefield.streaming.planner import Planner, make_planner
from widefield.streaming.program import Program
from widefield.streaming.program_cache import ProgramCache
from widefield.streaming.ranks import Ranks
from widefield.streaming.receptive_field import Cells
from widefield.streaming.refusals import refuse_parts
from widefield.streaming.running import run, run_plain
from widefield.streaming.store import PLACES, Place
from widefield.streaming.tiles import LazyImage, Normalisation, map_input
from widefield.streaming.verification import verify_at_first_use

_READ: dict[str, Callable[[Any], Any]] = {"tile_size": parse_tile_size, "memory_budget": parse_bytes}


class StreamingCNN(nn.Module):
    """`module`, computed tile by tile: the same results and gradients, in a fraction of the memory.

    Called on an image it returns what `module` returns, as an ordinary differentiable call: `loss.backward()` fills every
    parameter's `.grad`, and the image's if it requires grad. An image is a tensor (N, C, H, W) or an object that is read lazily
    (`LazyImage`: one image, a batch of 1, never held whole); a list of them gives a list of results.

    Layers that keep running statistics are evaluated with them, whatever their mode; their affine parameters train.

    Args:
        module: any `nn.Module` of operations that are local in space. It is used as it is and stays available as `.module`:
            the same parameter objects, the same state_dict keys. Its mode flags are never changed.
        tile_size: pixels of the image that are read per step: an int, (height, width), or (height, None) for strips over the
            whole width. None derives it from `memory_budget`, or from the memory that is free.
        memory_budget: bytes, or text such as "2GiB", for everything above the weights, their gradients and the image.
        mean, std: per channel, for values from 0 to 1. Integer images are divided by their dtype's maximum first.
        value_range: (low, high), which values of the image become 0 and 1; needed for float images that are not in 0..1.
        batch_statistics: what batch norm layers in training mode normalise by: "frozen", their running statistics, or "exact", the
            statistics of the whole batch of whole images, as the plain module does, which updates the running statistics. Then
            there is a stage per norm layer, and the maps between stages come near what the plain module stores. A list of
            images is one batch.
        maps: where maps between stages live (a model with operations over the whole image has several stages): "device", "host",
            or "file", a file that goes with the run. None: on the device, unless the memory is too small for them.
        scratch_dir: folder for such files. None: the system's folder for temporary files, which may be in memory.
        saliency: keep the gradient of the last image tensor, a tensor like it in host memory, as `.saliency_map`.
        deterministic: run forward and backward passes with deterministic algorithms only (`torch.use_deterministic_algorithms`).
        copy_to_gpu: move an image tensor to the device of the module as a whole, not tile by tile.
        unsupported: what to do with a layer that cannot be streamed: "raise" `UnsupportedOpError`, or "run_whole": run it, and
            all that depends on it, on whole maps.
        process_group: the processes that share each image, all of which call this module with the same one: a process group of
            `torch.distributed` to which this process belongs, or a `DeviceMesh` of one dimension. Each reads and computes a band of
            rows, with what its receptive field covers beyond it. Results that are no maps are the same in all processes, as one
            process has them, and so are all gradients, if all of them compute the same loss; of a map among the results each
            process has its band of rows (see `gather` of `forward`).
        verify: at the first call, and again for another batch size, dtype, mode or structure of the module, compare with the plain
            module on a small image.

    Attributes:
        module: the module that was given.
        saliency_map: see `saliency`.
        progress: a function that is called as progress(phase, steps done, steps) after each step; None.
        enabled: False after `disable()`.

    Raises:
        UnsupportedOpError: at the first call, before any pixel is computed, naming the layer that cannot be streamed.
        VerificationError: at the first call: on a small image, the streamed results are not those of the plain module.
        ValueError: for arguments or images that cannot be used.

    Examples:
        >>> layer, image = nn.Conv2d(3, 4, 3, stride=2), torch.rand(1, 3, 99, 70)
        >>> bool(torch.allclose(StreamingCNN(layer, tile_size=32)(image), layer(image), atol=1e-6))
        True
    """

    def __init__(
        self,
        module: nn.Module,
        tile_size: int | tuple[int, int | None] | None = None,
        *,
        memory_budget: int | str | None = None,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
        value_range: tuple[float, float] | None = None,
        batch_statistics: Literal["frozen", "exact"] = "frozen",
        maps: Place | None = None,
        scratch_dir: str | os.PathLike[str] | None = None,
        saliency: bool = False,
        deterministic: bool = False,
        copy_to_gpu: bool = False,
        unsupported: Literal["raise", "run_whole"] = "raise",
        verify: bool = True,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise ValueError(f"module must be a torch.nn.Module, got {type(module).__name__}: {module!r:.100}")
        if unsupported not in ("raise", "run_whole"):
            raise ValueError(f"unsupported={unsupported!r} must be 'raise' or 'run_whole'")
        self.module = module
        self.tile_size = parse_tile_size(tile_size)
        self.memory_budget = parse_bytes(memory_budget)
        self.normalisation = Normalisation.parse(mean, std, value_range)
        if batch_statistics not in ("frozen", "exact"):
            raise ValueError(f"batch_statistics={batch_statistics!r} must be 'frozen' or 'exact'")
        if maps not in (None, *PLACES):
            raise ValueError(f"maps={maps!r} must be one of {', '.join(map(repr, PLACES))}, or None")
        if scratch_dir is not None and not Path(scratch_dir).is_dir():
            raise ValueError(f"scratch_dir={str(scratch_dir)!r} is not a folder: make it first, or give another")
        self.batch_statistics = batch_statistics
        self.maps = maps
        self.scratch_dir = None if scratch_dir is None else os.fspath(scratch_dir)
        self.saliency, self.deterministic, self.copy_to_gpu = saliency, deterministic, copy_to_gpu
        self.saliency_map: Tensor | None = None
        self.unsupported = unsupported
        self.verify = verify
        self.enabled = True
        self.share(process_group)
        self.progress: Progress | None = None
        self._programs = ProgramCache()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; `tile_size` and `memory_budget` are parsed, and refused, as by the constructor."""
        super().__setattr__(name, _READ[name](value) if name in _READ else value)

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_programs", "progress", "saliency_map", "ranks")
        return {**self.__dict__, **dict.fromkeys(dropped)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._programs = ProgramCache()

    def share(self, process_group: Any, gather: bool = False) -> None:
        """From now on share each image with the processes of `process_group`, see the class; None: with no other.

        Args:
            process_group: as of the constructor.
            gather: put maps among the results together at every call, whatever `gather` of `forward` is.

        Raises:
            ValueError: it is no process group that this process belongs to.
        """
        self.ranks = Ranks.of(process_group)
        self.gather = gather
        self._limit: int | None = None  # bytes that all processes which share an image can use

    def extra_repr(self) -> str:
        return f"tile_size={self.tile_size}, memory_budget={self.memory_budget}"

    def forward(
        self,
        image: "Tensor | LazyImage | PreparedImage | Sequence[Any]",
        *maps: Any,
        region: tuple[int, int, int, int] | None = None,
        mask: Any = None,
        fill: float | Sequence[float] = 0.0,
        gather: bool = False,
    ) -> Any:
        """Stream `image`; see the class.

        Args:
            image: one image or batch, a list of images, or what `prepare` returned.
            maps: what the module's `forward` takes after the image: a label map, weights of positions, another modality. Each is a
                tensor (N, C, h, w) or (N, h, w), or read lazily as (C, h, w), a batch of one; its height and width are those of
                the image or whole fractions of them. Values and dtype are kept as they are, but for numbers that are read lazily
                and are not whole: they get the dtype of the module. With a list of images, each is a list.
            region: (y, x, height, width) in pixels of the image: of each map among the results, only the cells that it touches are
                returned, and nothing is read or computed that they do not depend on. Cell `o` of `n` along an axis stands for
                the pixels from `o * size / n` to `(o + 1) * size / n`. Results that are no maps are those of the whole image.
            mask: the foreground: a bool array of shape (rows, columns) or (N, rows, columns), of any size up to the image's; an
                object with such an array as `.cells` (`widefield.images.Mask`); or a function of the image that returns one.
                For a list of images, a list. Pixels outside of it are replaced by `fill`. A position of a map is foreground if its
                cell touches the mask (`adaptive_max_pool2d(mask, size of the map)`); operations over the whole image (pooling,
                normalisation, softmax over positions) run over the foreground alone, and maps among the results are zero
                outside of it. What neither depends on is not read and not computed.
            fill: a pixel of the background, as the image stores it: one number or one for each channel.
            gather: with a `process_group`, put the maps among the results together from the bands of all processes, in each.
        """
        if isinstance(image, (list, tuple)):
            return results_of_each(self, image, maps, region, mask, fill, gather)
        inputs = check_inputs(self, image, maps, region, mask, fill, gather)
        if not self.enabled:
            return run_plain(self, inputs)
        program = self._verified_program(inputs)
        planner = self._planner(program, inputs.kind, inputs.wanted)
        return run(self, planner, inputs)

    @torch.no_grad()
    def write(
        self,
        image: "Tensor | LazyImage | PreparedImage",
        to: Any,
        *maps: Any,
        postprocess: Any = None,
        dtype: Any = None,
        region: tuple[int, int, int, int] | None = None,
        mask: Any = None,
        fill: float | Sequence[float] = 0.0,
    ) -> Any:
        """Stream `image`, and write the maps among the results while they are computed: none is in memory as a whole.

        Written is what `forward` returns, after `postprocess`, without gradients. A file is there when it is complete, and not
        before: a run over many images that was cut off goes on with those whose files are not there. Where the image has a spacing
        or a place on a map, the file has those of the map's entries: side by side from the corner of the image on, if they cover
        it, and else, without padding, in the middles of their receptive fields (`cells`).

        With a `process_group` all processes call `write` alike, and the first of them writes: the others keep their rows in
        temporary files, in `scratch_dir`, until it takes them. All return when the file is complete, or raise if it cannot be
        written.

        Args:
            image: one image, or what `prepare` returned.
            to: a path, of which the ending says the format (`widefield.images.map_target`): `.ome.zarr`, `.zarr`, `.ome.tif`,
                `.tif`, `.geojson`, for one image and not a batch; an array or tensor of the map's shape, which need not be in
                memory (`numpy.memmap`); or an object that takes tiles (`widefield.streaming.map_writing.MapTarget`). A list has
                one for each map.
            maps: as of `forward`.
            postprocess: what is done with each tile (N, C, height, width): "argmax", "softmax" (over channels), "sigmoid", "uint8"
                (0 to 1 become 0 to 255); a number, above which values become 1 and others 0; a function of single positions; or a
                list of these, one after the other.
            dtype: of what is written. None: that of the result; "argmax" gives uint8 for up to 256 channels, uint16 for up to
                65536, and else int32. From floats to whole numbers values are rounded, and cut to the range of the type.
            region: as of `forward`: only these cells are computed and written.
            mask: as of `forward`. The background is written as zeros, after `postprocess`.
            fill: as of `forward`.

        Returns:
            The result, with the path or array in the place of each map; None for an array that another process has written to.

        Raises:
            ValueError: the result has no map that is computed tile by tile, or `to`, `postprocess` or `dtype` does not fit it.
            OSError: it cannot be written: the disk is full, say. What was at the path before is still there.
        """
        if isinstance(image, (list, tuple)):
            raise ValueError("write() takes one image: call it for each, with a path of its own")
        if not self.enabled:
            raise ValueError("maps are written as they are streamed, which disable() has turned off: call enable()")
        inputs = check_inputs(self, image, maps, region, mask, fill)
        program = self._verified_program(inputs)
        writing = plan_writing(program, inputs.wanted, to, postprocess, dtype, inputs.kind.device)
        if self.ranks is not None:
            maps_written = [each.written for each in writing.outputs.values()]
            described = [(one.name, one.shape, str(one.dtype)) for one in maps_written]
            self.ranks.agree({"written": described, "buffers": writing.memory}, None)
        planner = self._planner(program, inputs.kind, inputs.wanted, writing)
        return run(self, planner, inputs, writing=writing)

    def _verified_program(self, inputs: Inputs) -> Program:
        """The module captured for such inputs, and compared with the plain one at first use."""
        program = self._program(inputs.kind)
        if self.verify:
            verify_at_first_use(self, program, inputs.kind)
        if inputs.prepared is not None:
            inputs.prepared.check_state(self, program)
        return program

    @torch.no_grad()
    def prepare(
        self,
        image: Tensor | LazyImage,
        *maps: Tensor | LazyImage,
        mask: Any = None,
        fill: float | Sequence[float] = 0.0,
    ) -> "PreparedImage":
        """Compute what operations over the whole `image` need of it (means, statistics), once for many regions.

        `model(prepared, region=...)`, without gradients, then computes what the region needs. For a network without such operations
        there is nothing to compute. The arguments are those of `forward`; maps and a mask that are given here hold for all regions.

        Raises:
            ValueError: if batch norm layers would take the statistics of this image and update their running statistics
                (`batch_statistics="exact"` in training mode); later, if it is used with gradients, or after the image or anything
                that the module computes with has changed.
        """
        kind = kind_of_call(self.module, self.normalisation, image, maps)
        wanted = Wanted(foreground=parse_mask(mask, image, kind.shape), outputs=False)
        inputs = Inputs(image, maps, kind, wanted, fill)
        program = self._verified_program(inputs)
        if program.statistics:
            raise ValueError(
                f"prepare() is for inference, and layer '{program.statistics[0][0]}' is in training mode with "
                'batch_statistics="exact": call eval() first'
            )
        inputs, statistics = in_band(self, inputs), Statistics()
        run(self, self._planner(program, kind, inputs.wanted), inputs, statistics)
        statistics.known = True
        return PreparedImage(inputs, statistics, state_of(self, program, inputs))

    def backward(self, image: Tensor | LazyImage, grad: Tensor) -> None:
        """Add to all `.grad` what `grad`, the gradient of the result for `image`, gives.

        The result is computed once more for it. `self(image).backward(grad)` adds the same, and computes it once. Hooks on the
        result of this module take no part.

        Raises:
            ValueError: `grad` is None: the result has got no gradient.
        """
        if grad is None:
            raise ValueError(
                "grad is None: set requires_grad on the result before the loss is computed from it, then call loss.backward()"
            )
        with torch.enable_grad():
            self.forward(image).backward(grad)

    def disable(self) -> None:
        """Run the plain module on whole images from now on; layers that keep running statistics are evaluated with them still."""
        self.enabled = False

    def enable(self) -> None:
        """Stream again."""
        self.enabled = True

    def plan(
        self,
        shape: tuple[int, ...],
        *maps: Any,
        region: tuple[int, int, int, int] | None = None,
        mask: Any = None,
        to: Any = None,
        postprocess: Any = None,
        dtype: Any = None,
    ) -> Plan:
        """Return the plan for an image of `shape` (channels, height, width) or (N, channels, height, width).

        A training step if gradients are enabled and a parameter requires them, else a forward pass. `maps`, `region` and `mask`
        are as for `forward`; of `maps` only shapes and dtypes are looked at (`torch.empty(..., device="meta")` will do). `to`,
        `postprocess` and `dtype` are as for `write`, of which it is the plan then. With a `process_group`, the plan is that of
        this process.
        """
        device, dtype_of_image = device_and_dtype(self.module, None)
        full = (1, *shape) if len(shape) == 3 else tuple(shape)
        if len(full) != 4 or not all(isinstance(n, int) and n > 0 for n in full):
            raise ValueError(f"shape={shape} must be (channels, height, width) of positive ints")
        others = tuple(map_input(x, full, device, dtype_of_image) for x in maps)
        kind = CallKind(full, dtype_of_image, device, map_inputs=others)
        with torch.no_grad() if to is not None else nullcontext():
            program = self._program(kind)
            wanted = parse_wanted(kind, None, region, mask)
            if self.ranks is not None:
                wanted = replace(wanted or Wanted(), band=(self.ranks.rank, self.ranks.size))
            writing = None if to is None else plan_writing(program, wanted, to, postprocess, dtype, device)
            return self._planner(program, kind, wanted, writing).plan(wanted)[0]

    def cells(self, shape: tuple[int, ...], layer: str | None = None) -> Cells:
        """Return the places that the entries of a map look at, for an image of `shape` (channels, height, width).

        Args:
            shape: As for `plan`.
            layer: Path of a layer in `module`, whose last map is meant; None means the result, of several the last. Where it is
                none, as behind attention of all positions to all, it is the last map before.

        Raises:
            ValueError: There is no such layer.
            UnsupportedOpError: As when the module is called.
        """
        names = dict(self.module.named_modules())
        if layer is not None and layer not in names:
            near = ", ".join(get_close_matches(layer, names)) or "the names of module.named_modules()"
            raise ValueError(f"layer={layer!r} is no layer of the module; give the path of one, such as {near}")
        device, dtype = device_and_dtype(self.module, None)
        program = self._program(CallKind((1, *shape) if len(shape) == 3 else tuple(shape), dtype, device))
        found = cells_of(program)
        result = [leaf.name for leaf in program.captured.outputs if isinstance(leaf, Ref) and leaf.name in found]
        inside = [name for name, (path, _) in found.items() if layer and f"{path}.".startswith(f"{layer}.")]
        return found[(inside or (result if layer is None else []) or list(found))[-1]][1]

    def _program(self, kind: CallKind) -> Program:
        """The module captured for such a call, from the cache if nothing about the module has changed."""
        for path, part in self.module.named_modules():
            if isinstance(part, StreamingCNN):
                remedy = f"stream the module inside: {path or 'model'}.module, or use it as it is"
                raise UnsupportedOpError(path, "StreamingCNN", "already streams", remedy)
        exact, whole = self.batch_statistics == "exact", self.unsupported == "run_whole"
        return self._programs.get(self.module, kind, exact, whole)

    def _alike(self, tile_size: tuple[int, int]) -> "StreamingCNN":
        """The same module with other tiles, for images that are normalised already; it shares what was captured."""
        other = StreamingCNN(
            self.module,
            tile_size,
            batch_statistics=self.batch_statistics,
            deterministic=self.deterministic,
            unsupported=self.unsupported,
            verify=False,
        )
        other._programs = self._programs
        return other

    @property
    def frozen_norms(self) -> list[nn.Module]:
        """Norm layers that are evaluated with their running statistics, whatever their mode."""
        if self.batch_statistics == "exact":
            return []
        return [part for part in self.module.modules() if getattr(part, "track_running_stats", False)]

    def _planner(
        self, program: Program, kind: CallKind, wanted: Wanted | None = None, writing: Writing | None = None
    ) -> Planner:
        """The planner of such calls for the current grad mode; refuses a part of the image that cannot be computed alone."""
        if wanted is not None:
            refuse_parts(program, wanted)
        device, kernels = kind.device, convolution_weights(self.module)
        learned = any(kind.requires_grad) or any(p.requires_grad for p in self.module.parameters())
        used = memory_format(device, kernels[0].dtype, kernels) if kernels else torch.contiguous_format
        request = PlanRequest(
            tile=self.tile_size,
            budget=self.memory_budget,
            device=device,
            maps=self.maps,
            training=torch.is_grad_enabled() and learned,
            copied_weights=sum(kernel.nbytes for kernel in kernels if not kernel.is_contiguous(memory_format=used)),
            stages=len(program.stages),
            partial=wanted is not None and wanted.scattered,
            limit=self._limit,
            ranks=1 if self.ranks is None else self.ranks.size,
            written=None if writing is None else writing.memory,
        )
        if request not in program.planners:
            program.planners[request] = make_planner(program, request)
        planner: Planner = program.planners[request]
        return planner


def stream(
    model: nn.Module,
    tile_size: int | tuple[int, int | None] | None = None,
    *,
    memory_budget: int | str | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    value_range: tuple[float, float] | None = None,
    batch_statistics: Literal["frozen", "exact"] = "frozen",
    maps: Place | None = None,
    scratch_dir: str | os.PathLike[str] | None = None,
    verify: bool = True,
    process_group: Any = None,
) -> StreamingCNN:
    """A whole model, classifier and all: what is local in space is streamed, the rest runs as it is.

    `stream(torchvision.models.resnet18())(image)` returns logits. `StreamingCNN` explains the arguments, and has some more.

    Examples:
        >>> model = wf.stream(torchvision.models.resnet18(num_classes=2), tile_size=64)
        >>> model(torch.rand(1, 3, 150, 90)).shape
        torch.Size([1, 2])
    """
    return StreamingCNN(
        model,
        tile_size,
        memory_budget=memory_budget,
        mean=mean,
        std=std,
        value_range=value_range,
        batch_statistics=batch_statistics,
        maps=maps,
        scratch_dir=scratch_dir,
        unsupported="run_whole",
        verify=verify,
        process_group=process_group,
    )
