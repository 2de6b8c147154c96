"""The code blocks of lightstream's two pages run as printed, where the pages are at hand.

Replaced are the name of the package in the import lines, the path of the data, the accelerator, and the download of weights. The
fast tests also take smaller images and fewer epochs; the slow ones take those that are printed.
"""

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchvision.models import WeightsEnum, resnet18, resnet34, resnet50

from tests.slides import run_page, write_slides
from widefield import StreamingConstructor, StreamingModule
from widefield.models.resnet import StreamingResNet

PAGES = Path(__file__).parents[3] / "shared" / "reference"
pytestmark = pytest.mark.skipif(not PAGES.is_dir(), reason="the pages are not part of the project")


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), flags=re.S)


CHECKS = """
assert trainer.current_epoch == trainer.max_epochs
assert trainer.precision == "bf16-mixed"
assert {"train_loss", "val_loss"} <= set(trainer.callback_metrics)
assert not any(p.requires_grad for p in model.stream_network.parameters())
image, _ = next(iter(train_loader))
assert image.shape == (1, 3, image_size, image_size)
assert 0 <= image.min() and image.max() <= 1  # scaled once, and the network takes float images as values from 0 to 1
trainer.test(model, test_loader, verbose=False)
assert "test_loss" in trainer.callback_metrics
"""


@pytest.mark.parametrize(
    ("side", "smaller"),
    [
        (
            1024,
            {"image_size=4096": "image_size=160", "max_epochs=15": "max_epochs=2", "tile_size=2880": "tile_size=96"},
        ),
        pytest.param(4096, {}, marks=pytest.mark.slow),
    ],
    ids=["smaller", "as printed"],
)
def test_the_tutorial(side: int, smaller: dict[str, str], tmp_path: Path) -> None:
    write_slides(tmp_path / "CAMELYON16", 5, side)
    code = "\n".join(blocks("lightstream-classification-tutorial.md"))
    replaced = {
        "import albumentationsxl as A": "import widefield.transforms as A",
        "from lightstream.": "from widefield.",
        'Path("/data/pathology/archives/breast/camelyon/CAMELYON16")': f"Path({str(tmp_path / 'CAMELYON16')!r})",
        'accelerator="gpu"': 'accelerator="cpu"',
        **smaller,
    }
    for old, new in replaced.items():
        assert old in code
        code = code.replace(old, new)
    run_page(code + CHECKS, tmp_path)


def custom_model(names: dict[str, Any]) -> type[StreamingModule]:
    """The page's class with the page's methods."""
    split, network, forward, step = blocks("lightstream-custom-models.md")[:4]
    exec(compile(split, "page", "exec"), names)
    exec(compile(network + textwrap.indent(forward + "\n" + step, "    "), "page", "exec"), names)
    return names["StreamingResNet"]


@pytest.mark.parametrize("trains", [True, False])
def test_the_custom_model(trains: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: make(weights=None).state_dict() for name, make in {"ResNet18_Weights": resnet18}.items()}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *args, **kwargs: weights[type(self).__name__])
    names: dict[str, Any] = {"torch": torch, "nn": nn, "StreamingModule": StreamingModule, "Any": Any}
    names |= {"MetricCollection": MetricCollection, "resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}
    model = custom_model(names)(
        "resnet18", 64, nn.functional.cross_entropy, train_streaming_layers=trains, num_classes=2
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pictures = list(zip(torch.rand(2, 3, 96, 130), torch.tensor([0, 1]), strict=True))
    options: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    Trainer(**options, enable_checkpointing=False).fit(model, DataLoader(pictures))  # type: ignore[arg-type]
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[0] for name in moved} == ({"stream_network", "head"} if trains else {"head"})
    assert not any("running" in name for name in moved)


def test_the_constructors_arguments() -> None:
    (block,) = (text for text in blocks("lightstream-custom-models.md") if "before_streaming_init_callbacks" in text)
    page = [re.match(r"\w+", line).group() for line in block.strip().splitlines()]  # type: ignore[union-attr]
    ours = [name for name in inspect.signature(StreamingConstructor).parameters if name != "options"]
    assert ours == page


def test_what_verbose_prints_is_the_pages_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = (PAGES / "lightstream-classification-tutorial.md").read_text(encoding="utf-8")
    shown = text.split("Initializing streaming model")[1].split("Output lost")[0]
    lines = re.findall(r"top:(\S+), left:(\S+), bottom:(\S+), right:([\d.]+)\)", shown)
    lost = [tuple(int(float(number)) for number in line) for line in lines]
    net = StreamingResNet("resnet18", 2880, num_classes=2, weights=None, verbose=True)
    printed = capsys.readouterr().out
    layers = net.stream_network.plan((3, 2880, 2880)).layers
    assert [(one.lost.top, one.lost.left, one.lost.bottom, one.lost.right) for one in layers] == lost
    assert all(one.module_path in printed for one in layers)
