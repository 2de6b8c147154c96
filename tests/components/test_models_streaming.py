"""A classifier of a configuration whose backbone streams."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.components.lazy import Lazy
from tests.small_images import write_folder
from widefield.cli import main
from widefield.components import DataSample
from widefield.registry import MODELS

CONVNEXT: dict[str, Any] = {
    "type": "ConvNeXt",
    "arch": {"depths": [1, 1, 1, 1], "channels": [4, 8, 8, 8]},
    "out_indices": [1],
    "gap_before_final_norm": False,
}
MODEL: dict[str, Any] = {
    "type": "ImageClassifier",
    "lr": 0.01,
    "backbone": CONVNEXT,
    "neck": {"type": "GlobalAveragePooling"},
    "head": {"type": "LinearClsHead", "num_classes": 2, "in_channels": 8},
    "data_preprocessor": {
        "type": "ClsDataPreprocessor",
        "mean": [120.0, 110.0, 100.0],
        "std": [60.0, 50.0, 40.0],
        "to_rgb": True,
    },
}
STREAMED = {**CONVNEXT, "streaming": {"tile_size": 64}}


class Recorded(Lazy):
    """An image that knows the areas that were read of it."""

    def __init__(self, pixels: torch.Tensor) -> None:
        super().__init__(pixels)
        self.areas: list[int] = []

    def read(self, y: int, x: int, height: int, width: int) -> torch.Tensor:
        self.areas.append(height * width)
        return super().read(y, x, height, width)


def made(**changes: Any) -> Any:
    torch.manual_seed(0)
    return MODELS.build({**MODEL, **changes}).double()


def test_a_configuration_alone_trains_on_slides_as_without_streaming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path, side=96)
    config = {
        "model": MODEL,
        "data": {"images": "images", "labels": "labels.csv", "batch_size": 3},
        "trainer": {"max_epochs": 1, "precision": "64-true", "enable_progress_bar": False, "accelerator": "cpu"},
    }
    Path("my.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "my.yaml", "--out", "plain"]) == 0
    assert main(["fit", "--config", "my.yaml", "--out", "streamed", "model.backbone.streaming.tile_size=64"]) == 0
    plain, streamed = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("plain", "streamed"))
    assert streamed["hyper_parameters"]["backbone"]["streaming"] == {"tile_size": 64}
    assert streamed["state_dict"].keys() == plain["state_dict"].keys()
    for name, value in plain["state_dict"].items():
        torch.testing.assert_close(streamed["state_dict"][name], value, rtol=1e-8, atol=1e-10)
    for one, other in zip(history(tmp_path / "plain"), history(tmp_path / "streamed"), strict=True):
        assert float(one["val_loss"]) == pytest.approx(float(other["val_loss"]), rel=1e-8)


def history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_tensors_are_taken_as_they_are_and_lazily_read_images_normalised() -> None:
    model, plain = made(backbone=STREAMED), made()
    plain.load_state_dict(model.state_dict())
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    normalised, _ = plain.double().preprocess(images.double())
    torch.testing.assert_close(model(normalised), plain(normalised))
    torch.testing.assert_close(model([Lazy(image) for image in images]), plain(normalised))
    recorded = Recorded(images[0])
    torch.testing.assert_close(model(recorded), plain(normalised[:1]))
    assert 0 < max(recorded.areas) < 96 * 128 / 2
    assert model.backbone.streamed.normalisation.mean is None
    features = model.extract_feat([Lazy(image) for image in images], stage="backbone")
    torch.testing.assert_close(features[1][0], plain.extract_feat(normalised, stage="backbone")[0][1:])


def test_images_of_several_sizes_are_one_batch() -> None:
    model, plain = made(backbone=STREAMED), made()
    plain.load_state_dict(model.state_dict())
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((96, 128), (128, 64))]
    batch = ([Lazy(image) for image in images], torch.tensor([0, 1]))
    inputs, samples = model.preprocess(batch, training=True)
    loss = model.loss(inputs, samples)["loss"]
    expected = torch.stack(
        [
            plain.loss(plain.preprocess(image[None].double())[0], [DataSample().set_gt_label(label)])["loss"]
            for label, image in enumerate(images)
        ]
    ).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert [sample.pred_score.shape for sample in model.predict_step(batch, 0)] == [(2,), (2,)]
    with pytest.raises(ValueError, match="give a neck that pools"):
        made(backbone=STREAMED, neck=None).extract_feat(inputs)
    with pytest.raises(ValueError, match="ConvNeXt does not stream, so it takes no lazily read images"):
        plain(inputs)
    with pytest.raises(ValueError, match="Identity has no normalisation"):
        made(backbone=STREAMED, data_preprocessor=torch.nn.Identity())(inputs)
