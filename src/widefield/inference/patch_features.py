"""Features of the patches of slides, in files as users of CLAM and TRIDENT know them."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from widefield.components.models.features import background_of, foreground_of_map, left_out
from widefield.errors import WrongArgumentError
from widefield.images import ForegroundChoice, ImageFile, images_below, open_image
from widefield.images.feature_files import PatchFeatures, import_h5py
from widefield.inference.models import info_of, load_trained
from widefield.models import Classifier
from widefield.models.instances import is_patches, make_encoder
from widefield.reports import ProgressLine
from widefield.streaming import StreamingCNN
from widefield.writing import replacing

_log = logging.getLogger(__name__)
Format = Literal["hdf5", "zarr"]
_ENDINGS = {"hdf5": ".h5", "zarr": ".zarr"}


def embed_patches(
    out: str | Path,
    data: str | Path | Sequence[str | Path],
    model: str | None = None,
    *,
    checkpoint: str | Path | None = None,
    weights: str | None = None,
    patch_size: int = 224,
    spacing: float | None = None,
    level: int | None = None,
    foreground: str | Path | None = None,
    format: Format = "hdf5",
    memory_budget: int | str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write the features of the patches of each slide to a file, `NAME.h5` for `NAME.svs`, as CLAM and TRIDENT do.

    A file holds `features` (n, D), float32, and `coords` (n, 2), the x and y of the upper left corner of each patch with
    foreground, in pixels of the largest level. Attributes of `coords` are `patch_size` in pixels as they were read,
    `patch_size_level0`, `patch_level`, `overlap`, `level0_width`, `level0_height`, `spacing` in micrometres, `encoder` and `name`.
    `widefield fit --features` trains on such files. The slides are read and encoded as in training, tile by tile; patches lie side
    by side from the upper left corner, and those that reach beyond the right or lower border are left out.

    Args:
        out: Folder of the files.
        data: Folder of slides, a slide, or several.
        model: `patches:timm/NAME`.
        checkpoint: One of `widefield fit --model patches:...`, with its encoder, spacing and foreground, in place of `model`.
        weights: A file, or "DEFAULT" to download; None: random ones.
        patch_size: Side of a patch in pixels.
        spacing: Micrometres per pixel that are read, or
        level: the level of the pyramid.
        foreground: See `ForegroundChoice.method`; by default "otsu".
        format: "hdf5", which needs h5py, or "zarr": a group with the same arrays.
        memory_budget: See `StreamingCNN`.
        overwrite: Write files anew that are there. Else they stay, and their slides are not read.

    Returns:
        The files, in the order of the slides.

    Raises:
        ValueError: Arguments cannot be used.
        OSError: Slides or weights cannot be read.
    """
    if (model is None) == (checkpoint is None):
        raise WrongArgumentError(
            f"give model or checkpoint, one of them: got model={model!r}, checkpoint={checkpoint!r}"
        )
    if format not in _ENDINGS:
        raise WrongArgumentError(f"format={format!r} must be 'hdf5' or 'zarr'")
    if format == "hdf5":
        import_h5py()  # rather than after the first slide
    if checkpoint is None:
        assert model is not None
        if not is_patches(model):
            raise WrongArgumentError(f"model={model!r} must be patches:timm/NAME")
        encoder = make_encoder(model, weights, 3, patch_size, None, normalises=True)
        network = StreamingCNN(encoder, memory_budget=memory_budget)
        choice = ForegroundChoice("otsu" if foreground is None else str(foreground))

        def opened(path: Path) -> ImageFile:
            image = open_image(path, level, spacing=spacing)
            image.background = choice.of(image)
            return image
    else:
        trained: Any = load_trained(
            Path(checkpoint), streaming=None if memory_budget is None else {"memory_budget": memory_budget}
        )
        if not isinstance(trained, Classifier) or not is_patches(trained.model_name):
            raise WrongArgumentError(
                f"{checkpoint} has no encoder of patches; `widefield fit --model patches:...` trains one"
            )
        network, info, model = trained.stream_network, info_of(trained), trained.model_name
        info = info.with_foreground(None if foreground is None else str(foreground))

        def opened(path: Path) -> ImageFile:
            return info.open(path, level=level, spacing=spacing)

    network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    files: list[Path] = []
    slides = list(_slides([data] if isinstance(data, (str, Path)) else data))
    with ProgressLine(network, "slide") as line:
        for done, path in enumerate(slides):
            line.update(done, len(slides))
            file = Path(out) / f"{path.name.removesuffix(path.suffix)}{_ENDINGS[format]}"
            if file in files:
                raise WrongArgumentError(f"{path} and another slide would both be written to {file}; give them apart")
            files.append(file)
            if file.exists() and not overwrite:
                _log.info("%s is there already", file)
                continue
            found = features_of_patches(network, opened(path), model)
            write_features(file, found)
            _log.info("%s: %d patches", file, len(found.features))
    return files


def _slides(data: Sequence[str | Path]) -> Iterator[Path]:
    for one in map(Path, data):
        inside = images_below(one) if one.is_dir() else []
        if not one.exists() or (one.is_dir() and not inside and not one.suffix):
            raise FileNotFoundError(f"there are no slides in {one}")
        yield from inside or [one]


@torch.no_grad()
def features_of_patches(network: StreamingCNN, image: ImageFile, encoder: str | None) -> PatchFeatures:
    """Return the features of the patches of an image that have foreground.

    Args:
        network: A streamed `PatchEncoder`.
        image: Opened, with its background.
        encoder: Its name, which is noted.
    """
    windows: Any = network.module.windows
    background = background_of(image)
    fmap = network(image, **left_out(background))
    mask = (
        np.ones(fmap.shape[-2:], bool)
        if background is None
        else foreground_of_map(background, fmap.shape).cpu().numpy()
    )
    rows, columns = np.nonzero(mask)
    scale = [full / size for full, size in zip(image.levels[0], image.shape[1:], strict=True)]
    coords = np.stack([columns * windows.stride[1] * scale[1], rows * windows.stride[0] * scale[0]], 1)
    return PatchFeatures(
        fmap[0].float().cpu().numpy()[:, rows, columns].T.copy(),
        coords.round().astype(np.int64),
        {
            "patch_size": windows.size[0],
            "patch_size_level0": round(windows.size[0] * scale[0]),
            "patch_level": image.level,
            "overlap": windows.size[0] - windows.stride[0],
            "level0_width": image.levels[0][1],
            "level0_height": image.levels[0][0],
            "spacing": float("nan") if image.spacing is None else image.spacing[0],
            "encoder": encoder or "",
            "name": Path(image.path).stem,
        },
    )


def write_features(path: Path, content: PatchFeatures) -> None:
    """Write a file of features, whole or not at all: a Zarr group if `path` ends in `.zarr`, else HDF5.

    Raises:
        MissingExtraError: h5py is needed, and is not installed.
    """
    write: Callable[[Path, PatchFeatures], None] = _write_zarr if path.suffix == ".zarr" else _write_hdf5
    with replacing(path) as partial:
        write(partial, content)


def _write_hdf5(path: Path, content: PatchFeatures) -> None:
    with import_h5py().File(path, "w") as file:
        file.create_dataset("features", data=content.features)
        file.create_dataset("coords", data=content.coords).attrs.update(content.attributes)


def _write_zarr(path: Path, content: PatchFeatures) -> None:
    import zarr

    group = zarr.create_group(path)
    for name, array in (("features", content.features), ("coords", content.coords)):
        group.create_array(name, data=array)
    group["coords"].attrs.update(content.attributes)
