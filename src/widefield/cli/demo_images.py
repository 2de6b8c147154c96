"""The demo's images: large ones composed from a small photograph, with marks whose fine structure alone tells their class.

Every image carries clusters of round cells. In the class "smooth" all cells are plain; in the class "speckled" half of
the clusters are of cells with a fine red-green checkerboard of the same mean colour. The squares of the checkerboard are
3 pixels wide, so its period divides the factor of the thumbnails: a thumbnail averages it away, and both classes look
the same. On disk they are pyramidal TIFFs, with thumbnails, label tables and the positions of the marks.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyvips

from widefield.errors import MissingExtraError
from widefield.images import open_image, thumbnail
from widefield.writing import write_csv

SIDE = 1152
"""Height and width of an image, in pixels."""
CLASSES = ("smooth", "speckled")
CLUSTERS = 6
CLUSTER_RADIUS = 56
"""Farthest that the centre of a cell lies from that of its cluster, in pixels."""

_PATCH, _STEP = 448, 320
_CELLS, _CELL_RADIUS = 14, 7
_SQUARE, _CONTRAST = 3, 80.0


@dataclass(frozen=True)
class Composition:
    """An image (height, width, 3) uint8, and the centres (y, x) of its speckled clusters."""

    pixels: np.ndarray
    speckled: tuple[tuple[int, int], ...]


def load_photograph() -> np.ndarray:
    """The photograph of stained tissue that scikit-image ships: float32 (512, 512, 3) with values 0..255.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    try:
        from skimage import data
    except ImportError:
        raise MissingExtraError("`widefield demo`", "scikit-image", "demo") from None
    return np.asarray(data.immunohistochemistry(), np.float32)


def compose(photograph: np.ndarray, speckled: bool, generator: np.random.Generator) -> Composition:
    """An image of `SIDE` x `SIDE` pixels of the class "speckled" or "smooth"."""
    canvas = _background(photograph, generator)
    centres = _cluster_centres(generator)
    with_speckles = centres[: CLUSTERS // 2] if speckled else []
    for centre in centres:
        _draw_cluster(canvas, centre, centre in with_speckles, generator)
    return Composition(np.clip(canvas, 0, 255).astype(np.uint8), tuple(with_speckles))


def _background(photograph: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Random crops of the photograph, turned and mirrored, their colours shifted, blended over one another."""
    overlap = _PATCH - _STEP
    ramp = np.minimum((np.arange(_PATCH, dtype=np.float32) + 0.5) / overlap, 1)
    ramp = np.minimum(ramp, ramp[::-1])  # those of neighbours add up to one
    mask = (ramp[:, None] * ramp[None, :])[..., None]
    starts = range(0, SIDE + overlap, _STEP)
    canvas = np.zeros((starts[-1] + _PATCH, starts[-1] + _PATCH, 3), np.float32)
    for top in starts:
        for left in starts:
            canvas[top : top + _PATCH, left : left + _PATCH] += mask * _patch(photograph, generator)
    return canvas[overlap : overlap + SIDE, overlap : overlap + SIDE]


def _patch(photograph: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    top, left = (generator.integers(extent - _PATCH + 1) for extent in photograph.shape[:2])
    patch = photograph[top : top + _PATCH, left : left + _PATCH]
    patch = np.rot90(patch, int(generator.integers(4)))
    if generator.random() < 0.5:
        patch = patch[:, ::-1]
    return patch * generator.uniform(0.9, 1.1, 3).astype(np.float32)


def _cluster_centres(generator: np.random.Generator) -> list[tuple[int, int]]:
    """Centres that lie apart from one another and from the border."""
    centres: list[tuple[int, int]] = []
    while len(centres) < CLUSTERS:
        y, x = (int(value) for value in generator.integers(2 * CLUSTER_RADIUS, SIDE - 2 * CLUSTER_RADIUS, 2))
        if all(np.hypot(y - other_y, x - other_x) > 4 * CLUSTER_RADIUS for other_y, other_x in centres):
            centres.append((y, x))
    return centres


def _draw_cluster(canvas: np.ndarray, centre: tuple[int, int], speckled: bool, generator: np.random.Generator) -> None:
    rows, columns = np.mgrid[-_CELL_RADIUS : _CELL_RADIUS + 1, -_CELL_RADIUS : _CELL_RADIUS + 1]
    disc = (rows**2 + columns**2 <= _CELL_RADIUS**2)[..., None].astype(np.float32)
    for _ in range(_CELLS):
        distance, angle = CLUSTER_RADIUS * np.sqrt(generator.random()), 2 * np.pi * generator.random()
        y, x = round(centre[0] + distance * np.sin(angle)), round(centre[1] + distance * np.cos(angle))
        where = slice(y - _CELL_RADIUS, y + _CELL_RADIUS + 1), slice(x - _CELL_RADIUS, x + _CELL_RADIUS + 1)
        colour = np.array([130, 110, 140], np.float32) + generator.uniform(-15, 15, 3).astype(np.float32)
        signs = (-1.0) ** ((rows + y) // _SQUARE + (columns + x) // _SQUARE)
        texture = signs[..., None] * np.array([_CONTRAST, -_CONTRAST, 0]) if speckled else 0.0
        canvas[where] += disc * (colour + texture - canvas[where])


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
    write_csv(folder / "labels.csv", [{"image": image.name, "label": image.label} for image in made])
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
