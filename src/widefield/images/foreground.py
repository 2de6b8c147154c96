"""Foreground masks: which part of an image shows a specimen, found on a thumbnail or drawn by somebody."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import rgb_to_hsv
from PIL import Image, ImageDraw

from widefield.errors import WrongArgumentError
from widefield.images.formats import cannot_read, real_number
from widefield.images.image import ImageFile
from widefield.images.thumbnail import as_rgb, coarse_means

MASK_SIZE = 512
"""Cells on the long side of a mask, unless a spacing says otherwise."""


@dataclass(frozen=True)
class Mask:
    """A grid of cells over a whole image, of any coarser size.

    Attributes:
        cells: Boolean array (rows, columns), True in the foreground; cell (r, c) of R x C covers the image from r / R to
            (r + 1) / R of its height, and so for its width.
    """

    cells: np.ndarray

    def __post_init__(self) -> None:
        if not isinstance(self.cells, np.ndarray):
            raise WrongArgumentError(f"cells={self.cells!r} of a mask; expected a boolean array (rows, columns)")
        if self.cells.ndim != 2 or self.cells.dtype != np.bool_ or not self.cells.size:
            raise WrongArgumentError(
                f"a mask of shape {self.cells.shape} and type {self.cells.dtype}; expected a boolean array (rows, columns)"
            )

    @property
    def share(self) -> float:
        """Part of the image that is foreground, from 0 to 1."""
        return float(self.cells.mean())


def foreground(image: ImageFile, method: str | Path | np.ndarray = "otsu", *, spacing: float | None = None) -> Mask:
    """Find the foreground of an image on a thumbnail of it.

    Args:
        image: An opened image.
        method: One of

            - "otsu": where max - min over the channels is above Otsu's threshold of it; in a picture without colours, what
              differs from its most frequent grey by more than that threshold;
            - "hsv": where the saturation is above 15/255 and the brightness above 0.1 (black dust and borders are not);
            - the path of a GeoJSON file, as QuPath writes it: inside of its polygons, in pixels of level 0;
            - a boolean array (rows, columns) over the whole image.
        spacing: Micrometres per cell; by default the long side has 512 cells. Without effect on an array.

    Returns:
        The mask. Pixels without data (NaN, the file's value for missing data) are never foreground.

    Raises:
        ImageReadError: The image or the GeoJSON file cannot be read.
        ValueError: There is no such method, or a spacing is asked for of an image that does not say its own.

    Examples:
        >>> mask = wf.images.foreground(wf.open_image("slides/tumor_001.tif"), "hsv")
        >>> mask.cells.shape, 0 <= mask.share <= 1
        ((512, 512), True)
    """
    if not isinstance(image, ImageFile):
        raise WrongArgumentError(f"image={image!r}; expected an image that open_image returned")
    size = MASK_SIZE
    if spacing is not None:
        expected = "micrometres per cell, above 0"
        spacing = real_number("spacing", spacing, f"a mask of {image.path}", expected, lambda one: 0 < one < math.inf)
        if image.spacing is None:
            raise WrongArgumentError(
                f"a mask of {spacing:g} micrometres per cell needs the spacing of {image.path}, which has none"
            )
        size = max(1, round(max(n * s for n, s in zip(image.shape[1:], image.spacing, strict=True)) / spacing))
    if isinstance(method, np.ndarray):
        return Mask(method)
    if isinstance(method, Path) or (isinstance(method, str) and is_geojson(method)):
        return _inside_polygons(image, Path(method), size)
    if not isinstance(method, str) or method not in METHODS:
        raise WrongArgumentError(
            f"foreground method {method!r}; expected {', '.join(METHODS)}, a GeoJSON file or an array"
        )
    return mask_of(coarse_means(image, size), image.dtype, str(method))


def is_geojson(method: str | Path) -> bool:
    """True if it names a GeoJSON file rather than a method."""
    return str(method).lower().endswith((".geojson", ".json"))


def mask_of(means: np.ndarray, dtype: np.dtype, method: str) -> Mask:
    """Find the foreground on the `coarse_means` (channels, rows, columns) of an image of `dtype`, by a method of `METHODS`."""
    return Mask(METHODS[method](as_rgb(means, dtype)) & np.isfinite(means).any(0))


def by_otsu(picture: np.ndarray) -> np.ndarray:
    """Return a mask (H, W), True where an RGB picture (H, W, 3) of uint8 is coloured, or differs from its usual grey."""
    values = picture.astype(np.int16)
    score = values.max(2) - values.min(2)
    if score.max() < 16:
        grey = values.mean(2).round().astype(np.int16)
        score = abs(grey - np.bincount(grey.ravel(), minlength=256).argmax())
    return score > _otsu(score)


def _otsu(values: np.ndarray) -> int:
    """The threshold t of integers from 0 to 255 that maximises the variance between `values <= t` and the others.

    N. Otsu, A threshold selection method from gray-level histograms, 1979.
    """
    counts = np.bincount(values.ravel().astype(np.int64), minlength=256).astype(np.float64)
    below, sums = counts.cumsum(), (counts * np.arange(256)).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return int(np.nan_to_num(between).argmax())


def _by_saturation(picture: np.ndarray) -> np.ndarray:
    hsv = rgb_to_hsv(picture / 255.0)
    return (hsv[..., 1] > 15 / 255) & (hsv[..., 2] > 0.1)


METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"otsu": by_otsu, "hsv": _by_saturation}
"""Functions from an RGB picture to a mask of it, by name."""


def _inside_polygons(image: ImageFile, path: Path, size: int) -> Mask:
    polygons = [rings for _, rings in named_polygons(path)]
    if not polygons:
        raise cannot_read(path, "it holds no polygon; expected Polygon or MultiPolygon in a FeatureCollection")
    height, width = image.levels[
        0
    ]  # in whose pixels the polygons are; there are never more cells than pixels that are read
    scale = min(1.0, size / max(image.shape[1:]))
    rows, columns = (max(1, round(n * scale)) for n in image.shape[1:])
    cells = np.zeros((rows, columns), bool)
    for outer, *holes in polygons:
        drawn = Image.new("1", (columns, rows))
        draw = ImageDraw.Draw(drawn)
        for ring, inside in ((outer, 1), *((hole, 0) for hole in holes)):
            draw.polygon([(x * columns / width - 0.5, y * rows / height - 0.5) for x, y, *_ in ring], fill=inside)
        cells |= np.array(drawn)
    return Mask(cells)


def named_polygons(path: Path) -> Iterator[tuple[str | None, Sequence[Any]]]:
    """Yield the class and the rings of each polygon of a GeoJSON file; None where it names no class.

    Raises:
        FileNotFoundError: There is no such file.
        ImageReadError: It is no GeoJSON.
    """
    try:
        yield from list(_named(json.loads(path.read_text(encoding="utf-8")), None))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise cannot_read(path, f"it is no GeoJSON ({type(error).__name__}: {error})") from error


def _named(content: Any, name: str | None) -> Iterator[tuple[str | None, Sequence[Any]]]:
    if isinstance(content, list):
        for one in content:
            yield from _named(one, name)
        return
    match content["type"]:
        case "FeatureCollection":
            yield from _named(content["features"], name)
        case "Feature":
            properties = content.get("properties") or {}
            found = properties.get("classification", properties.get("class", properties.get("label")))
            yield from _named(content["geometry"], found.get("name") if isinstance(found, Mapping) else found)
        case "GeometryCollection":
            yield from _named(content["geometries"], name)
        case "Polygon":
            yield name, content["coordinates"]
        case "MultiPolygon":
            for rings in content["coordinates"]:
                yield name, rings
