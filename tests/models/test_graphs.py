"""Models as ONNX files and programs of torch.export, compared with the model before a file is left."""

import logging
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import widefield
from widefield.cli import main
from widefield.errors import MissingExtraError
from widefield.models import Classifier, DifferentGraphError, Segmenter, write_graph

NAMES = ["a", "b", "c"]


def run_file(path: Path, image: Tensor) -> Tensor:
    """What the file makes of an image."""
    if path.suffix == ".pt2":
        with torch.no_grad():
            return torch.export.load(path).module()(image)  # type: ignore[no-any-return]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


def write_checkpoint(path: Path, model: Classifier | Segmenter) -> Path:
    """A checkpoint as `fit` writes it, of images of 8 bits."""
    data = {"class_names": model.class_names, "pixels": (3, "uint8")}
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "LabelledImages": data}
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.ckpt", Classifier("resnet18_w8", NAMES))


@pytest.mark.parametrize(("format", "name"), [("onnx", "model.onnx"), ("torch_export", "model.pt2")])
def test_the_command_writes_a_classifier_for_images_of_any_size_and_says_how_far_it_is_from_the_model(
    format: str, name: str, classifier: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / name
    assert main(["export", "--checkpoint", str(classifier), "--format", format, "--out", str(out)]) == 0
    assert "the largest difference from the model is" in " ".join(capfd.readouterr().err.split())
    image = torch.randint(0, 256, (1, 3, 97, 130), dtype=torch.uint8)
    expected = Classifier.from_checkpoint(classifier)[0].plain_model()(image)
    assert torch.allclose(run_file(out, image), expected, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_segmentation_network_gives_its_map(tmp_path: Path) -> None:
    model = Segmenter("timm/test_resnet", NAMES)
    checkpoint = write_checkpoint(tmp_path / "best.ckpt", model)
    widefield.export(tmp_path / "model.onnx", checkpoint, format="onnx")
    image = torch.randint(0, 256, (1, 3, 96, 160), dtype=torch.uint8)
    found = run_file(tmp_path / "model.onnx", image)
    assert found.shape == (1, 3, 96, 160) and torch.allclose(found, model.plain_model()(image), atol=1e-4)
    widefield.export(tmp_path / "weights.safetensors", checkpoint, format="safetensors")
    assert (tmp_path / "weights.safetensors").stat().st_size > 1000


def test_a_network_of_one_size_is_refused_with_the_size_to_give_and_written_with_it(tmp_path: Path) -> None:
    class OneSize(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.reshape(1, 3, 32, 48).mean((2, 3))

    with pytest.raises(ValueError, match=r"with height and width left open .*; give image_size=\[HEIGHT, WIDTH\]"):
        write_graph(OneSize(), "torch_export", tmp_path / "m.pt2", 3)
    assert write_graph(OneSize(), "torch_export", tmp_path / "m.pt2", 3, image_size=(32, 48)) == 0
    with pytest.raises(ValueError, match=r"for images of .*give an image_size that it takes"):
        write_graph(OneSize(), "torch_export", tmp_path / "m.pt2", 3, image_size=(32, 32))


class Calls(nn.Module):
    """Gives something else at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        return image * self.calls


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_file_that_differs_is_not_left_and_the_old_one_stays(value: Any, tmp_path: Path) -> None:
    out = tmp_path / "m.pt2"
    out.write_bytes(b"old")
    module: nn.Module = Calls()
    if value is not None:
        module = nn.Conv2d(3, 1, 1)
        nn.init.constant_(module.weight, value)
    with pytest.raises(DifferentGraphError, match=r"is not written: .* differs from the model by up to .*safetensors"):
        write_graph(module, "torch_export", out, 3)
    assert out.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


def test_float64_is_compared_to_ten_digits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "widefield"):
        network = nn.Conv2d(3, 2, 3, dtype=torch.float64)
        assert write_graph(network, "torch_export", tmp_path / "m.pt2", 3, torch.float64) <= 1e-10
    assert "224 x 288 and 320 x 192" in caplog.text


def test_what_a_graph_cannot_be_of_is_said(classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.onnx"
    with pytest.raises(ValueError, match="image_size=64 is for format=onnx and torch_export"):
        widefield.export(out, classifier, image_size=64)
    with pytest.raises(ValueError, match="'adapters' are weights alone"):
        widefield.export(out, classifier, format="onnx", part="adapters")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'widefield\[onnx\]'"):
        widefield.export(out, classifier, format="onnx")
    assert not out.exists()
