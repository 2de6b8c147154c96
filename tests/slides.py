"""Small pyramidal TIFFs with labels, laid out and named as in CAMELYON16."""

from pathlib import Path
from typing import Any

import numpy as np
import pyvips
import tifffile
import torch
import torchvision
from skimage import data
from torchvision.models import WeightsEnum

from tests.fresh import run_code


def write_slides(root: Path, count: int, side: int) -> None:
    """`images/*.tif`, pyramids down to one pixel, the largest level `side` x `side`, and `evaluation/reference.csv`.

    As many slides named `normal_...` as `tumor_...`, `count` of each, and half as many named `test_...` of each class. Those of
    tumours have a dark patch.
    """
    (root / "images").mkdir(parents=True)
    (root / "evaluation").mkdir()
    tissue = pyvips.Image.new_from_array(data.immunohistochemistry())
    generator = np.random.default_rng(0)
    rows = ["image,class"]
    names = [(f"{kind}_{k + 1:03d}", kind == "tumor") for kind in ("normal", "tumor") for k in range(count)]
    names += [(f"test_{k + 1:03d}", bool(k % 2)) for k in range(count)]
    for name, tumor in names:
        slide = tissue.replicate(side // 512 + 1, side // 512 + 1).crop(
            *(int(n) for n in generator.integers(0, 512, 2)), side, side
        )
        if tumor:
            x, y = (int(n) for n in generator.integers(0, side // 2, 2))
            slide = slide.draw_rect([60, 20, 80], x, y, side // 3, side // 3, fill=True)
        slide.tiffsave(
            str(root / "images" / f"{name}.tif"), tile=True, tile_width=64, tile_height=64, pyramid=True, compression="jpeg",
            xres=4000, yres=4000, depth="onepixel",
        )  # fmt: skip
        rows.append(f"{name},{'tumor' if tumor else 'negative'}")
    (root / "evaluation" / "reference.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def without_downloads() -> None:
    """From now on torchvision's pretrained weights are random ones of the same network; the rest of its loading code runs."""

    def get_state_dict(self: WeightsEnum, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        name = type(self).__name__.removesuffix("_Weights").lower()
        return torchvision.models.get_model(name, weights=None).state_dict()

    WeightsEnum.get_state_dict = get_state_dict


def run_page(code: str, folder: Path) -> str:
    """Run `code` in `folder` without downloads, in a new interpreter; what it prints."""
    return run_code(f"from tests.slides import without_downloads\nwithout_downloads()\n{code}", folder)


def write_blank_slide(
    path: Path,
    side: int = 4096,
    tissue: slice = slice(480, 1000),
    spacing: float | None = 0.5,
    levels: int = 1,
    shift: int = 0,
) -> Path:
    """A slide of 64 x `side` pixels, grey but for the columns `tissue` of stained tissue, whose colours are rotated by `shift`."""
    path.parent.mkdir(exist_ok=True)
    pixels = np.full((64, side, 3), 240, np.uint8)
    stained = np.tile(
        np.roll(data.immunohistochemistry()[200:264, :, :] // 2 + np.uint8([120, 10, 60]), shift, 2), (1, 8, 1)
    )
    pixels[:, tissue] = stained[:, : pixels[:, tissue].shape[1]]
    place: dict[str, Any] = {}
    if spacing is not None:
        place = {"resolution": (1e4 / spacing, 1e4 / spacing), "resolutionunit": "centimeter"}
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            reduced = pixels[:: 2**level, :: 2**level]
            pyramid = {"subifds": levels - 1} if level == 0 else {"subfiletype": 1}
            file.write(reduced, photometric="rgb", metadata=None, tile=(64, 64), **pyramid, **place)
    return path
