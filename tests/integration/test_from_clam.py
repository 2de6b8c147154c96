"""The page for users of CLAM and TRIDENT: its commands and its code run as printed, on small slides and with a small network."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import pyvips

from tests.fresh import run_code
from widefield.cli import main
from widefield.models.instances import POOLINGS

PAGE = (Path(__file__).parents[2] / "docs" / "from-clam.md").read_text(encoding="utf-8")
SMALLER = {
    "vit_small_patch16_224": "test_vit",
    "resnet18": "test_resnet",
    "384": "64",
    "size=224": "size=32",
    "patch_size=512": "patch_size=96",
    "image_size=448": "image_size=64",
    "per_slide=16": "per_slide=1",
    "--epochs 20": "--epochs 1",
}


def small(code: str) -> str:
    for large, little in SMALLER.items():
        code = code.replace(large, little)
    return code


def write_slides(folder: Path) -> None:
    (folder / "slides").mkdir()
    rows = ["slide_id,case_id,label"]
    generator = np.random.default_rng(0)
    for k in range(1, 7):
        pixels = np.full((128, 160, 3), 240, np.uint8)
        pixels[30:100, 40:120] = [200 - 60 * (k % 2), 60, 150]
        pixels[30:100, 40:120] += generator.integers(0, 20, (70, 80, 3), dtype=np.uint8)
        image = pyvips.Image.new_from_array(pixels)
        image.tiffsave(
            str(folder / "slides" / f"a{k}.tif"), tile=True, tile_width=64, tile_height=64, xres=2000, yres=2000
        )
        rows.append(f"a{k},patient_{k},{('normal', 'tumor')[k % 2]}")
    (folder / "labels.csv").write_text("\n".join(rows), encoding="utf-8")


def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_slides(tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S)
    commands = [command for block in blocks for command in small(block).replace("\\\n", " ").splitlines()]
    assert len(commands) == 10
    for command in commands:
        name, *arguments = shlex.split(command)
        assert name == "widefield"
        more = ["model.patch_size=32"] if arguments[0] == "fit" and "--images" in arguments else []
        assert main([*arguments, *more]) == 0, command
    assert len(list((tmp_path / "features").glob("*.h5"))) == 6
    assert len(list((tmp_path / "runs/frozen/features").glob("*.zarr"))) == 6
    assert (tmp_path / "runs/lora/adapters/adapter_model.safetensors").is_file()
    code = small("\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)))
    assert run_code(code, tmp_path).split() == ["64", "2", "['encoder',", "'level0_height',", "'level0_width']"]


def test_every_pooling_is_on_the_page() -> None:
    for name in POOLINGS:
        assert f"`{name}`" in PAGE, name
