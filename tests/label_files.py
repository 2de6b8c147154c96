"""Folders of small images with label maps, or with maps of numbers, for tests."""

from pathlib import Path

import numpy as np
import PIL.Image
import tifffile


def write_label_map(path: Path, labels: np.ndarray, palette: bool = False) -> None:
    """A PNG, with `palette` of indices."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = PIL.Image.fromarray(labels)
    if palette:
        image.putpalette([value for k in range(256) for value in (k, 255 - k, 7)])
    image.save(path)


def write_segmented(folder: Path, count: int = 4, size: tuple[int, int] = (64, 72), palette: bool = False) -> None:
    """Images with a red and a green square in the folder `images`, their label maps in `masks`; the first row is ignored (255)."""
    random = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for k in range(count):
        labels = np.zeros(size, np.uint8)
        for label in (1, 2):
            y, x = (int(random.integers(0, n - 24)) for n in size)
            labels[y : y + 24, x : x + 24] = label
        pixels = random.integers(0, 60, (*size, 3), dtype=np.uint8)
        for channel, label in ((0, 1), (1, 2)):
            pixels[..., channel] += np.uint8(150) * (labels == label)
        labels[0] = 255
        PIL.Image.fromarray(pixels).save(folder / "images" / f"im{k}.png")
        write_label_map(folder / "masks" / f"im{k}.png", labels, palette)


def write_paired(folder: Path, count: int = 4, size: tuple[int, int] = (64, 72)) -> None:
    """Grey images of bytes in the folder `images`, and in `targets` smooth maps of floats around 100, of which they are noisy."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[: size[0], : size[1]]
    for name in ("images", "targets"):
        (folder / name).mkdir(parents=True)
    for k in range(count):
        smooth = np.sin(y / random.uniform(4, 9)) + np.cos(x / random.uniform(4, 9))
        noisy = 127 + 50 * smooth + random.normal(0, 10, size)
        tifffile.imwrite(folder / "images" / f"im{k}.tif", noisy.clip(0, 255).astype(np.uint8))
        tifffile.imwrite(folder / "targets" / f"im{k}.tif", (100 + 3 * smooth).astype(np.float32))
