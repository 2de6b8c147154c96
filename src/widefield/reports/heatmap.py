"""Heatmaps: evidence for a class, registered to the image, and the files of it that other programs read."""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
import tifffile
from torch import Tensor

from widefield.components.models.features import background_of, foreground_of_map
from widefield.images import ImageFile
from widefield.images.formats import Transform
from widefield.images.image import scaled
from widefield.images.map_geotiff import import_rasterio
from widefield.images.map_target import halved
from widefield.images.thumbnail import data_at
from widefield.streaming import Cells
from widefield.writing import replacing

_TILE = 256
"""Side of the tiles of a TIFF file, and of its smallest level at most."""
COLOUR = (0, 220, 80)
"""Red, green and blue of the evidence, from 0 to 255."""


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """The evidence for a class, and where in the image its entries lie. Everything is told in pixels of the largest level.

    Attributes:
        evidence: Array (h, w) of floats, see `class_activation` and `grad_cam`; NaN where the image holds no data, and in its
            background.
        cells: The places that the entries look at.
        size: (height, width) of the image.
        spacing: Micrometres per pixel, (y, x); None if unknown.
        crs: Coordinate reference system of a map, see `ImageFile`.
        transform: Place of the largest level on the map, see `ImageFile`; None if the image is no map.

    Examples:
        >>> cells = Cells(size=(4, 4), origin=(15.5, 15.5), stride=(32.0, 32.0))
        >>> evidence = np.outer([0, 1, 5, 1], [0, 2, 1, 0]).astype(np.float32)
        >>> Heatmap(evidence=evidence, cells=cells, size=(128, 128)).peak
        (80, 48)
    """

    evidence: np.ndarray
    cells: Cells
    size: tuple[int, int]
    spacing: tuple[float, float] | None = None
    crs: str | None = None
    transform: Transform | None = None

    @classmethod
    def of(cls, evidence: Tensor, cells: Cells, image: ImageFile | Tensor) -> "Heatmap":
        """Return the heatmap of an image, without the cells whose middle lies where a file holds no data, see `data_at`.

        Cells of the image's background have no evidence either.

        Args:
            evidence: (h, w), on any device.
            cells: In pixels of `image`, see `cells_of`.
            image: What the model got: a file at whatever level, or a tensor (C, H, W), whose spacing is unknown.
        """
        height, width = image.shape[-2:]
        size = (height, width) if isinstance(image, Tensor) else image.levels[0]
        scale = size[0] / height, size[1] / width
        found = cls(
            evidence=evidence.float().cpu().numpy(),
            cells=Cells(
                cells.size,
                # the corner of the image, half a pixel before the middle of the first, is the same at each level
                ((cells.origin[0] + 0.5) * scale[0] - 0.5, (cells.origin[1] + 0.5) * scale[1] - 0.5),
                (cells.stride[0] * scale[0], cells.stride[1] * scale[1]),
            ),
            size=size,
        )
        if isinstance(image, Tensor):
            return found
        shown = data_at(image, *found._middles)
        if (background := background_of(image)) is not None:
            shown &= foreground_of_map(background, evidence.shape).numpy()
        return replace(
            found,
            evidence=np.where(shown, found.evidence, np.nan),
            spacing=image.spacing and (image.spacing[0] / scale[0], image.spacing[1] / scale[1]),
            crs=image.crs,
            transform=image.transform and scaled(image.transform, 1 / scale[0], 1 / scale[1]),
        )

    @property
    def _middles(self) -> tuple[np.ndarray, np.ndarray]:
        """Middles of the rows and columns of cells, in pixels from the corner of the image."""
        rows, columns = (
            start + 0.5 + step * np.arange(count)
            for start, step, count in zip(self.cells.origin, self.cells.stride, self.evidence.shape, strict=True)
        )
        return rows, columns

    @property
    def peak(self) -> tuple[int, int] | None:
        """Pixel (y, x) of the image that the entry of the greatest evidence looks at, the nearest one inside of the image.

        None if there is no evidence, as the image holds no data.
        """
        if np.isnan(self.evidence).all():
            return None
        entry = np.unravel_index(int(np.nanargmax(self.evidence)), self.evidence.shape)
        y, x = (
            min(max(math.floor(start + step * int(index) + 0.5), 0), size - 1)
            for start, step, index, size in zip(self.cells.origin, self.cells.stride, entry, self.size, strict=True)
        )
        return y, x

    @property
    def edges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """(top, bottom) and (left, right) of all cells, in pixels from the corner of the image."""
        tops = [start + 0.5 - step / 2 for start, step in zip(self.cells.origin, self.cells.stride, strict=True)]
        rows, cols = (
            (top, top + step * count)
            for top, step, count in zip(tops, self.cells.stride, self.evidence.shape, strict=True)
        )
        return rows, cols

    def resampled(self, pixel: tuple[float, float]) -> np.ndarray:
        """Return the evidence on a grid that covers the image, each entry that of the cell at its middle, 0 where there is none.

        The corner of the grid is that of the image.

        Args:
            pixel: Height and width of an entry of the grid, in pixels of the image.
        """
        rows, cols = (
            np.floor(((np.arange(math.ceil(size / side - 1e-9)) + 0.5) * side - first) / step).astype(int)
            for size, side, (first, _), step in zip(self.size, pixel, self.edges, self.cells.stride, strict=True)
        )
        inside = np.outer((rows >= 0) & (rows < self.cells.size[0]), (cols >= 0) & (cols < self.cells.size[1]))
        found = self.evidence[np.ix_(rows.clip(0, self.cells.size[0] - 1), cols.clip(0, self.cells.size[1] - 1))]
        return np.where(inside & ~np.isnan(found), found, 0).astype(np.float32)

    def save_tiff(self, path: Path, name: str) -> None:
        """Write a pyramidal OME-TIFF of float32, two entries to a cell each way, from the corner of the image on.

        It is written whole or not at all.

        Args:
            path: Of the file; `.ome.tif` is what other programs expect.
            name: Of the channel.
        """
        pixel = max(1.0, self.cells.stride[0] / 2), max(1.0, self.cells.stride[1] / 2)
        levels = [self.resampled(pixel)]
        while max(levels[-1].shape) > _TILE:
            levels.append(halved(levels[-1][None], labels=False)[0])
        metadata: dict[str, Any] = {"axes": "YX", "Channel": {"Name": name}}
        spacing = None
        if self.spacing is not None:
            spacing = self.spacing[0] * pixel[0], self.spacing[1] * pixel[1]
            metadata |= {"PhysicalSizeY": spacing[0], "PhysicalSizeX": spacing[1]}
            metadata |= {"PhysicalSizeYUnit": "µm", "PhysicalSizeXUnit": "µm"}
        with (
            replacing(path) as partial,
            tifffile.TiffWriter(partial, ome=True, bigtiff=levels[0].nbytes > 2**31) as file,
        ):
            for number, level in enumerate(levels):
                of_level: dict[str, Any] = (
                    {"subifds": len(levels) - 1, "metadata": metadata} if number == 0 else {"subfiletype": 1}
                )
                if spacing is not None:
                    per_cm = 1e4 / spacing[1] / 2**number, 1e4 / spacing[0] / 2**number
                    of_level |= {"resolution": per_cm, "resolutionunit": "CENTIMETER"}
                file.write(level, tile=(_TILE, _TILE), compression="zlib", photometric="minisblack", **of_level)

    def save_geotiff(self, path: Path, name: str) -> None:
        """Write a cloud optimized GeoTIFF of float32 in the place of the image on the map, a pixel for each cell.

        It is written whole or not at all. The middle of a pixel is the middle of the receptive field of its cell. NaN is its value
        for missing data.

        Args:
            path: Of the file.
            name: Of the band.

        Raises:
            MissingExtraError: rasterio, which the extra `geo` brings, is not installed.
            ValueError: The image is no map: `transform` is None.
        """
        rasterio = import_rasterio("a heatmap on a map (GeoTIFF)")
        if self.transform is None:
            raise ValueError("the image has no place on a map, so there is no GeoTIFF of it; use save_tiff")
        a, b, c, d, e, f = self.transform
        (top, _), (left, _) = self.edges
        corner = (a, b, a * left + b * top + c, d, e, d * left + e * top + f)
        place = rasterio.Affine(*scaled(corner, *self.cells.stride))
        (height, width), layout = self.evidence.shape, {"compress": "deflate", "predictor": "yes", "blocksize": _TILE}
        shape = {"height": height, "width": width, "count": 1, "dtype": "float32", "nodata": math.nan}
        averaged = {"overview_resampling": "average"}
        with (
            replacing(path) as partial,
            rasterio.open(
                partial, "w", driver="COG", crs=self.crs, transform=place, **shape, **layout, **averaged
            ) as file,
        ):
            file.write(self.evidence.astype(np.float32), 1)
            file.set_band_description(1, name)

    def save_geojson(self, path: Path, name: str, shares: Sequence[float]) -> None:
        """Write the contours of the evidence as annotations for QuPath: a FeatureCollection of polygons. Whole or not at all.

        Positions are in pixels of the image from its corner, (x, y). Each polygon has its threshold among its measurements, and
        where the spacing is known its area. Evidence that is nowhere positive has no contours.

        Args:
            path: Of the file.
            name: Of the class.
            shares: Thresholds, as shares of the greatest evidence.
        """
        top = float(np.fmax.reduce(self.evidence, axis=None))
        features = [
            self._feature(rings, name, share, share * top)
            for share in (shares if top > 0 else ())
            for rings in self.regions(share * top)
        ]
        text = json.dumps({"type": "FeatureCollection", "features": features}, ensure_ascii=False)
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")

    def regions(self, threshold: float) -> list[list[np.ndarray]]:
        """Return the polygons in which the evidence, interpolated between cells, is above `threshold`.

        They end at the latest where a cell without evidence begins. Each is a list of closed rings, arrays (n, 2) of (x, y) in
        pixels from the corner of the image: the outline, and holes.
        """
        y, x = (
            np.clip(start + 0.5 + step * np.array([-0.5, *range(count), count - 0.5]), 0, size)
            for start, step, count, size in zip(
                self.cells.origin, self.cells.stride, self.evidence.shape, self.size, strict=True
            )
        )
        evidence = self.evidence.astype(np.float64)
        # halfway to a cell without evidence, even the greatest falls to the threshold
        without = threshold - abs(np.fmax.reduce(evidence, axis=None) - threshold)
        evidence = np.where(np.isnan(evidence), without, evidence)
        around = np.pad(evidence, 1, mode="edge")  # cells at the border end at their edges
        generator: Any = contourpy.contour_generator(x, y, around, fill_type=contourpy.FillType.OuterOffset)
        outlines, starts = generator.filled(threshold, np.inf)[:2]
        found = [
            [points[start:stop] for start, stop in itertools.pairwise(of_rings)]
            for points, of_rings in zip(outlines, starts, strict=True)
        ]
        return [rings for rings in found if _area(rings[0]) > 0]

    def _feature(self, rings: list[np.ndarray], name: str, share: float, threshold: float) -> dict[str, Any]:
        measurements = {"evidence above": threshold, "share of the greatest evidence": share}
        if self.spacing is not None:
            pixels = _area(rings[0]) - sum(map(_area, rings[1:]))
            measurements["area µm^2"] = round(pixels * self.spacing[0] * self.spacing[1], 3)
        return {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [np.round(ring, 2).tolist() for ring in rings]},
            "properties": {
                "objectType": "annotation",
                "name": f"{name}: evidence above {share:.0%} of the greatest",
                "classification": {"name": name, "color": list(COLOUR)},
                "measurements": measurements,
            },
        }


def _area(ring: np.ndarray) -> float:
    """Return the area inside a closed ring (n, 2)."""
    x, y = ring.T
    return abs(float(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1]))) / 2
