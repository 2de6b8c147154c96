"""Label maps of images, read region by region: label images, and polygons in GeoJSON that are drawn as they are needed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from widefield.errors import WidefieldError
from widefield.images.foreground import is_geojson, named_polygons
from widefield.images.formats import strips
from widefield.images.image import ImageFile, open_image


class LabelMapError(WidefieldError, ValueError):
    """A label map that does not go with its image or with the classes; the message names the file."""


class LabelMap:
    """The class of each pixel of an image, read region by region. Made by `open_labels`.

    No dataclass: Lightning takes those apart when it converts a batch.

    Attributes:
        path: The file.
        shape: (1, height, width).
        dtype: Type of the labels, whole numbers.
    """

    def __init__(self, path: Path, source: "ImageFile | Polygons") -> None:
        self.path, self._source = path, source
        self.shape, self.dtype = (1, *source.shape[1:]), source.dtype

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Return the labels of a region, (1, height, width), in pixels of the image."""
        return self._source.read(y, x, height, width)


def open_labels(path: str | Path, image: ImageFile, class_names: Sequence[str] | None = None) -> LabelMap:
    """Open the label map of an image; of a label image no pixels are read yet.

    A label image has one channel of whole numbers, the indices of classes, and the size of the image as it is opened; where it has
    a palette its indices count. A GeoJSON file holds polygons in pixels of the largest level, such as QuPath exports: each is of
    the class of that name (`properties.classification.name`), those behind lie over those before, and all else is class 0. A pixel
    belongs to a polygon if its middle lies inside, by the even-odd rule.

    Args:
        path: The file.
        image: Its image.
        class_names: Names of the classes, for GeoJSON.

    Raises:
        FileNotFoundError: There is no such file.
        ImageReadError: It cannot be read.
        LabelMapError: It has another size than the image, several channels or no whole numbers, or a polygon is of no class.
    """
    path = Path(path)
    if is_geojson(path):
        full, size = image.levels[0], image.shape[1:]
        scale = size[0] / full[0], size[1] / full[1]
        return LabelMap(path, Polygons.read_file(path, (1, *size), scale, class_names))
    source = open_image(path, palette="indices")
    if source.shape[0] != 1 or source.dtype.kind not in "uib":
        raise LabelMapError(
            f"{path} has {source.shape[0]} channel(s) of {source.dtype}; a label image has one channel of whole numbers, the "
            "indices of classes"
        )
    if source.shape[1:] != image.shape[1:]:
        height, width = source.shape[1:]
        raise LabelMapError(
            f"the label map {path} has {height} x {width} pixels, and its image {image.path}, level {image.level}, "
            f"{image.shape[1]} x {image.shape[2]}; give one of the same size, or read the image at the level of its labels"
        )
    return LabelMap(path, source)


def class_counts(labels: ImageFile | LabelMap, count: int) -> np.ndarray:
    """Return how many pixels of a label map have each of `count` classes; it is read strip by strip."""
    total = np.zeros(count, np.int64)
    for y, rows in strips(labels):
        strip = labels.read(y, 0, rows, labels.shape[2])
        total += np.bincount(strip[(strip >= 0) & (strip < count)].ravel(), minlength=count)
    return total


class Polygons:
    """Polygons of classes, drawn region by region: a pixel is the same whatever the regions.

    Args:
        path: The file they are from.
        shape: (1, height, width).
        shapes: Classes and edges; an edge is a row (x, y, x of its end, y of its end) in pixels.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, path: Path, shape: tuple[int, int, int], shapes: Sequence[tuple[int, np.ndarray]]) -> None:
        self.path, self.shape, self._shapes = path, shape, list(shapes)

    @classmethod
    def read_file(
        cls, path: Path, shape: tuple[int, int, int], scale: tuple[float, float], class_names: Sequence[str] | None
    ) -> "Polygons":
        """Read a GeoJSON file whose coordinates, times `scale` (y, x), are pixels."""
        index = {name: k for k, name in enumerate(class_names or ())}
        shapes = []
        for name, rings in named_polygons(path):
            if name not in index:
                raise LabelMapError(
                    f"{path} has a polygon of the class {name!r}, expected one of {', '.join(index) or 'no class'}; name all "
                    "classes, that of what no polygon covers first"
                )
            points = [np.asarray(ring, np.float64)[:, :2] * (scale[1], scale[0]) for ring in rings]
            edges = [np.concatenate([ring, np.roll(ring, -1, 0)], axis=1) for ring in points]
            shapes.append((index[name], np.concatenate(edges)))
        return cls(path, shape, shapes)

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        """Return the classes of a region, (1, height, width)."""
        labels = np.zeros((height, width), np.uint8)
        for label, edges in self._shapes:
            (x0, y0, x1, y1) = edges.T
            if y0.max() <= y or y0.min() >= y + height or x0.max() <= x or x0.min() >= x + width:
                continue
            first, last = (int(np.clip(n, y, y + height)) for n in (np.floor(y0.min()), np.ceil(y0.max())))
            crossed = np.zeros((last - first, width + 1), np.uint8)
            rows = np.arange(first, last) + 0.5
            for k, middle in enumerate(rows):  # where the edges cross the middle of this row
                at = (y0 <= middle) != (y1 <= middle)
                places = x0[at] + (middle - y0[at]) * ((x1[at] - x0[at]) / (y1[at] - y0[at]))
                columns = np.clip(np.ceil(places - 0.5) - x, 0, width).astype(np.int64)
                np.add.at(crossed[k], columns, 1)
            inside = np.cumsum(crossed[:, :width], axis=1, dtype=np.uint8) % 2 == 1
            labels[first - y : last - y][inside] = label
        return labels[None]
