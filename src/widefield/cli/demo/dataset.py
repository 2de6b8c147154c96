"""The demo's images on disk: pyramidal TIFFs, their thumbnails, label tables and the positions of the marks."""

import csv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyvips

from widefield.cli.demo.composition import CLASSES, compose, load_photograph
from widefield.images import open_image, thumbnail

THUMBNAIL = 192
"""Side of a thumbnail, in pixels."""
SPACING = 0.5
"""Micrometres per pixel that the files state."""


@dataclass(frozen=True)
class Made:
    """One image that was made: its name without extension, its class, and the centres (y, x) of its speckled clusters."""

    name: str
    label: str
    speckled: tuple[tuple[int, int], ...]


def make_images(folder: Path, count: int, seed: int, done: Callable[[], None]) -> list[Made]:
    """Write `count` images, half of each class, as `folder/images/*.tif`, `folder/thumbnails/*.png` and `folder/labels.csv`.

    Args:
        folder: Is made.
        count: Of images.
        seed: Of everything that is drawn; each image has its own generator.
        done: Called after each image.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    photograph = load_photograph()
    (folder / "images").mkdir(parents=True)
    (folder / "thumbnails").mkdir()

    def make(index: int) -> Made:
        name, label = f"image-{index:03d}", CLASSES[index % 2]
        composition = compose(photograph, label == CLASSES[1], np.random.default_rng((seed, index)))
        path = folder / "images" / f"{name}.tif"
        _write_tiff(path, composition.pixels)
        small = thumbnail(open_image(path), THUMBNAIL)
        pyvips.Image.new_from_array(small).pngsave(str(folder / "thumbnails" / f"{name}.png"))
        done()
        return Made(name, label, composition.speckled)

    with ThreadPoolExecutor(max_workers=2) as pool:
        made = list(pool.map(make, range(count)))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label"])
        writer.writerows((image.name, image.label) for image in made)
    return made


def _write_tiff(path: Path, pixels: np.ndarray) -> None:
    """A tiled pyramid, JPEG inside, with its resolution in pixels per millimetre."""
    pyvips.Image.new_from_array(pixels).tiffsave(
        str(path),
        tile=True,
        tile_width=512,
        tile_height=512,
        pyramid=True,
        compression="jpeg",
        Q=90,  # below 90 colours are stored at half the resolution, which would blur the marks
        xres=1000 / SPACING,
        yres=1000 / SPACING,
        resunit="cm",
    )
