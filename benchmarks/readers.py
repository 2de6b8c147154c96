"""Readers of images beside the bare libraries: rows and tiles of a photograph per second.

    uv run --all-extras python benchmarks/readers.py

A picture of `--size` pixels made of photographs that scikit-image ships is written in each format and read in full-width rows of
256 pixels, from top to bottom, and in tiles of 256 x 256 pixels in random order; by `wf.open_image` and by the library that a user
would call instead, both opened anew for each pass. Medians of `--repeats` interleaved passes in one process. Prints a Markdown
table.
"""

import argparse
import datetime
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pyvips
import rasterio
import skimage.data
import tifffile
import zarr

import widefield as wf

Read = Callable[[int, int, int, int], np.ndarray]


def by_libvips(path: Path) -> Read:
    image = pyvips.Image.new_from_file(str(path), access="random")
    region = pyvips.Region.new(image)
    shape = (-1, image.bands)

    def read(y: int, x: int, height: int, width: int) -> np.ndarray:
        return (
            np.frombuffer(region.fetch(x, y, width, height), np.uint8)
            .reshape(height, width, shape[1])
            .transpose(2, 0, 1)
        )

    return read


def by_tifffile(path: Path) -> Read:
    array: Any = zarr.open(tifffile.imread(path, aszarr=True), mode="r")
    return lambda y, x, height, width: array[y : y + height, x : x + width].transpose(2, 0, 1)


def by_openslide(path: Path) -> Read:
    slide = openslide.OpenSlide(str(path))
    return lambda y, x, height, width: np.asarray(slide.read_region((x, y), 0, (width, height)))[..., :3].transpose(
        2, 0, 1
    )


def by_rasterio(path: Path) -> Read:
    raster = rasterio.open(path)
    return lambda y, x, height, width: raster.read(window=((y, y + height), (x, x + width)))


def by_zarr(path: Path) -> Read:
    group: Any = zarr.open(str(path), mode="r")
    array = group["0"]
    return lambda y, x, height, width: array[:, y : y + height, x : x + width]


def by_numpy(path: Path) -> Read:
    array = np.load(path, mmap_mode="r")
    return lambda y, x, height, width: np.array(array[:, y : y + height, x : x + width])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="rows of the table whose name contains this, such as lzw")
    options = parser.parse_args()
    pyvips.cache_set_max(0)  # or it gives what it decoded in an earlier pass
    warnings.simplefilter("ignore")  # rasterio warns of pictures that are no maps
    photograph = skimage.data.immunohistochemistry()
    pixels = np.tile(photograph, (-(-options.size // 512),) * 2 + (1,))[: options.size, : options.size]
    channels_first = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    print(f"`python benchmarks/readers.py --size {options.size}`, {datetime.date.today()}\n")
    print("| file | library | rows/s | Widefield | tiles/s | Widefield |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files: list[tuple[str, Path, Callable[[Path], Read]]] = []
        for compression in ("jpeg", "deflate", "lzw", "zstd"):
            layouts: tuple[tuple[dict[str, Any], str], ...] = (
                ({"tile": (256, 256)}, "tiles"),
                ({"rowsperstrip": 16}, "strips"),
            )
            for layout, kind in layouts:
                path = root / f"{compression}-{kind}.tif"
                colours = "ycbcr" if compression == "jpeg" else "rgb"
                predictor = compression in ("deflate", "zstd", "lzw")
                tifffile.imwrite(
                    path,
                    pixels,
                    photometric=colours,
                    compression=compression,
                    predictor=predictor,
                    metadata=None,
                    **layout,
                )
                libraries = [by_tifffile] if compression == "zstd" else [by_libvips, by_tifffile]
                files += [(f"TIFF, {compression}, {kind}", path, library) for library in libraries]
        description = "Aperio Image Library v11\r\n|AppMag = 20|MPP = 0.5"
        for name, compression_of_slide in (("JPEG", "jpeg"), ("JPEG 2000", 33005)):
            path = root / f"{compression_of_slide}.svs"
            tifffile.imwrite(
                path,
                pixels,
                description=description,
                photometric="ycbcr" if compression_of_slide == "jpeg" else "rgb",
                compression=compression_of_slide,
                tile=(256, 256),
                metadata=None,
            )
            files.append((f"SVS, {name}", path, by_openslide))
        path, shape = root / "map.tif", {"height": options.size, "width": options.size, "count": 3, "dtype": "uint8"}
        with rasterio.open(
            path, "w", driver="GTiff", tiled=True, blockxsize=256, blockysize=256, compress="zstd", **shape
        ) as raster:
            raster.write(channels_first)
        files.append(("GeoTIFF, zstd, tiles", path, by_rasterio))
        group = zarr.create_group(str(root / "a.zarr"), attributes={"ome": {"version": "0.5", "multiscales": [{
            "axes": [{"name": "c", "type": "channel"}, {"name": "y", "type": "space"}, {"name": "x", "type": "space"}],
            "datasets": [{"path": "0"}]}]}})  # fmt: skip
        group.create_array("0", data=channels_first, chunks=(3, 256, 256))
        files.append(("OME-Zarr, zstd", root / "a.zarr", by_zarr))
        np.save(root / "a.npy", channels_first)
        files.append(("npy", root / "a.npy", by_numpy))
        for name, path, library in (one for one in files if options.only in one[0]):
            compare(name, path, library, options.size, options.repeats)


def compare(name: str, path: Path, library: Callable[[Path], Read], size: int, repeats: int) -> None:
    readers: tuple[Callable[[], Read], ...] = (lambda: library(path), lambda: wf.open_image(path).read)
    tiles = [(y, x, 256, 256) for y in range(0, size - 255, 256) for x in range(0, size - 255, 256)]
    random.Random(0).shuffle(tiles)
    cells = []
    for regions in ([(y, 0, 256, size) for y in range(0, size - 255, 256)], tiles):
        times: list[list[float]] = [[], []]
        for repeat in range(repeats + 1):  # the first round warms up
            for opening, seconds in zip(readers, times, strict=True):
                start = time.perf_counter()
                read = opening()  # anew, so that nothing decoded is left of the pass before
                for region in regions:
                    read(*region)
                if repeat:
                    seconds.append(time.perf_counter() - start)
        bare, ours = (len(regions) / statistics.median(seconds) for seconds in times)
        cells.append(f"{bare:.0f} | {ours:.0f} ({ours / bare:.2f} x)")
    print(f"| {name} | {library.__name__.removeprefix('by_')} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
