"""Small pyramidal TIFFs with labels, laid out and named as in CAMELYON16."""

from pathlib import Path

import numpy as np
import pyvips
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
