"""A whole model as a graph for other runtimes, ONNX or a program of torch.export: written, run from its file, and compared."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from widefield.errors import MissingExtraError, WidefieldError, WrongArgumentError
from widefield.writing import replacing

_log = logging.getLogger(__name__)
GRAPHS = ("onnx", "torch_export")
_SIZES = ((224, 288), (320, 192))
"""Height and width of the images that are compared where any may come; whole multiples of the strides of most networks."""
_RELATIVE = 1e-4
"""A share of the largest output: the difference that another order of float32 sums explains, with room; in float64 it is 1e-10."""


class DifferentGraphError(WidefieldError, RuntimeError):
    """A graph that was written does not compute what the model computes; the file is not kept."""


def write_graph(
    module: nn.Module,
    format: str,
    out: Path,
    channels: int,
    dtype: torch.dtype = torch.float32,
    image_size: tuple[int, int] | None = None,
) -> float:
    """Write `module` as a graph that takes one image (1, channels, H, W), and compare it with `module` on random images.

    Args:
        module: Gives a tensor, or tensors in lists or dictionaries.
        format: One of `GRAPHS`. "onnx" is one file with its weights, of which the input is called `image`; "torch_export" is for
            `torch.export.load`.
        out: The file, which is replaced; if anything is wrong, it stays as it was.
        channels: Of the images.
        dtype: Of the images: integers from 0 to their largest, or floats from 0 to 1.
        image_size: Height and width that the graph takes, these alone; None leaves both open.

    Returns:
        The largest difference between outputs of the file and of `module`.

    Raises:
        MissingExtraError: onnxruntime or onnxscript are not installed.
        WrongArgumentError: The module cannot be exported.
        DifferentGraphError: The difference is more than rounding.

    Examples:
        >>> difference = write_graph(nn.Conv2d(3, 2, 3), "torch_export", Path("model.pt2"), channels=3)
        >>> difference < 1e-5
        True
    """
    if format == "onnx":
        _check_onnx()
    module = module.cpu().eval()
    sizes = _SIZES if image_size is None else (image_size,)
    images = [_random_image(channels, size, dtype, seed) for seed, size in enumerate(sizes)]
    with torch.no_grad(), replacing(out) as partial, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.export, about its own future
        program = _program(module, images[0], is_open=image_size is None)
        run = (_write_onnx if format == "onnx" else _write_program)(program, partial)
        difference, largest = _compare(module, run, images)
        bound = _RELATIVE if next((p.dtype for p in module.parameters()), dtype) != torch.float64 else 1e-10
        if not difference <= bound * largest:
            raise DifferentGraphError(
                f"{out} is not written: on random images the {format} file differs from the model by up to {difference:.3g}, its "
                f"outputs being up to {largest:.3g}; export a state dict (format=safetensors) and load it into the network there"
            )
    shown = " and ".join(f"{height} x {width}" for height, width in sizes)
    _log.info(
        "%s: on random images of %s the largest difference from the model is %.2g, of outputs up to %.3g",
        out,
        shown,
        difference,
        largest,
    )
    return difference


def _check_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("format=onnx", str(error.name), "onnx") from error


def _random_image(channels: int, size: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, channels, *size)
    if dtype.is_floating_point:
        return torch.rand(shape, generator=generator, dtype=dtype)
    return torch.randint(0, torch.iinfo(dtype).max, shape, generator=generator, dtype=dtype)


def _program(module: nn.Module, image: Tensor, is_open: bool) -> torch.export.ExportedProgram:
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC} if is_open else {}
    try:
        return torch.export.export(module, (image,), dynamic_shapes=(sizes,))
    except Exception as error:  # whatever the forward of a user's module raises, too
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        left_open = " with height and width left open" if is_open else f" for images of {image.shape[2:]!s:.60}"
        advice = (
            "give image_size=[HEIGHT, WIDTH], such as image_size=[224, 224], for a file that takes this size alone"
            if is_open
            else "give an image_size that it takes, or export a state dict (format=safetensors)"
        )
        raise WrongArgumentError(
            f"the {type(module).__name__} cannot be exported{left_open} ({reason:.200}); {advice}"
        ) from error


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    made: Any = torch.onnx.export(program, input_names=["image"], dynamo=True, verbose=False)
    made.save(path, external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(one) for one in session.run(None, {"image": image.numpy()})]


def _write_program(program: torch.export.ExportedProgram, path: Path) -> Callable[[Tensor], list[Tensor]]:
    with path.open("wb") as file:
        torch.export.save(program, file)  # type: ignore[arg-type]
    with path.open("rb") as file:
        loaded = torch.export.load(file).module()  # type: ignore[arg-type]
    return lambda image: tree_leaves(loaded(image))


def _compare(module: nn.Module, run: Callable[[Tensor], list[Tensor]], images: list[Tensor]) -> tuple[float, float]:
    """Return the largest difference of any output on any image, and the largest absolute output."""
    differences, values = [], []
    for image in images:
        expected = [one for one in tree_leaves(module(image)) if isinstance(one, Tensor)]
        for one, found in zip(expected, run(image), strict=True):
            differences.append(float((one.double() - found.double()).abs().max()))
            values.append(float(one.double().abs().max()))
    return max(differences), max(values)
