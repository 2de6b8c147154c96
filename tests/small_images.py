"""A folder of small labelled images, for tests."""

from pathlib import Path

import numpy as np
import pyvips

CLASSES = ("dark", "bright")


def write_image(path: Path, pixels: np.ndarray) -> None:
    pyvips.Image.new_from_array(pixels).write_to_file(str(path))


def write_tiff(path: Path, pixels: np.ndarray) -> None:
    """A tiled pyramid with 0.5 micrometres per pixel."""
    pyvips.Image.new_from_array(pixels).tiffsave(
        str(path), tile=True, tile_width=64, tile_height=64, pyramid=True, xres=2000, yres=2000, compression="deflate"
    )


def write_folder(folder: Path, count: int = 8, side: int = 96) -> tuple[Path, Path]:
    """`count` TIFFs, half of each class, in a folder, and their table; (folder of images, label table)."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    lines = ["image,label"]
    for index in range(count):
        label = index % 2
        pixels = generator.integers(0, 100, (side, side, 3), dtype=np.uint8) + np.uint8(150 * label)
        write_tiff(folder / "images" / f"im{index}.tif", pixels)
        lines.append(f"im{index},{CLASSES[label]}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "images", folder / "labels.csv"
