"""`widefield fit --features`, and what trains beside the logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import widefield
from widefield.cli import main
from widefield.images.feature_files import PatchFeatures
from widefield.inference.patch_features import write_features
from widefield.models import Classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bags of instances; those of class b have one that is far off."""
    folder = tmp_path_factory.mktemp("features")
    generator = np.random.default_rng(0)
    rows = ["slide_id,label,split"]
    for k in range(8):
        features = generator.normal(size=(int(generator.integers(5, 12)), 6)).astype(np.float32)
        if k % 2:
            features[0, :3] += 8
        coords = np.stack([np.arange(len(features)) * 224] * 2, 1)
        name = f"s{k}.{'h5' if k < 6 else 'zarr'}"
        (folder / "bags").mkdir(exist_ok=True)
        write_features(folder / "bags" / name, PatchFeatures(features, coords, {"patch_size": 224}))
        rows.append(f"s{k},{'ab'[k % 2]},{'train' if k < 6 else 'val'}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


def test_a_head_is_trained_on_files_of_features_tested_and_predicts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--labels", str(folder / "labels.csv"), "--pooling", "abmil", "--epochs", "12", "--lr", "0.02"]
    assert main(["fit", "--features", str(folder / "bags"), *flags, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    capsys.readouterr()
    assert main(["validate", "--run", str(tmp_path / "run")]) == 0
    assert "val_accuracy  1" in capsys.readouterr().out
    bags = str(folder / "bags")
    checkpoint = str(tmp_path / "run" / "best.ckpt")
    assert main(["predict", "--checkpoint", checkpoint, "--out", str(tmp_path / "found"), bags]) == 0
    rows = (tmp_path / "found" / "predictions.csv").read_text().splitlines()
    assert [row.split(",")[3] for row in rows] == ["predicted", *"abababab"]
    model = widefield.get_model(tmp_path / "run")
    assert type(model.head).__name__ == "GatedAttentionPooling"


def test_features_take_the_place_of_images_and_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--labels", str(folder / "labels.csv"), "--out", str(tmp_path / "run"), "--model", "resnet18"]
    assert main(["fit", "--features", str(folder / "bags"), *flags]) == 2
    assert "takes the place of --images and --model" in capsys.readouterr().err
    assert main(["fit", "--features", str(folder / "none"), *flags[:4]]) == 2
    assert "the folder of features" in capsys.readouterr().err


@pytest.mark.parametrize("pooling", ["clam-mb", "dsmil"])
def test_training_adds_the_loss_of_the_papers_and_validation_does_not(pooling: str) -> None:
    torch.manual_seed(0)
    model = Classifier("features", ["a", "b"], pooling=pooling, in_channels=6).eval()
    bags = [torch.randn(1, 6, 1, n) for n in (5, 9)]
    targets = torch.tensor([1, 0])
    lazy = [_Bag(bag) for bag in bags]
    outputs, loss = model.output_and_loss(lazy, targets, "train")
    expected = [model.head.loss(bag, target[None], functional.cross_entropy) for bag, target in zip(bags, targets)]
    torch.testing.assert_close(loss, torch.stack([one for _, one in expected]).mean())
    torch.testing.assert_close(outputs, torch.cat([logits for logits, _ in expected]))
    _, plain = model.output_and_loss(lazy, targets, "val")
    torch.testing.assert_close(plain, functional.cross_entropy(outputs, targets))
    assert not torch.allclose(plain, loss)


class _Bag:
    def __init__(self, bag: Tensor) -> None:
        self.shape, self.bag = tuple(bag.shape[1:]), bag[0]

    def read(self, y: int, x: int, height: int, width: int) -> np.ndarray:
        return self.bag[:, y : y + height, x : x + width].numpy()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "abml"}, "did you mean abmil|abmil"),
        ({"lora": 4}, "lora=4 is for encoders of patches"),
        ({"cache_features": True}, r"freeze it with model.train_streaming_layers=false"),
        ({"pooling": "clam", "target": {"task": "multilabel"}}, "one class for each image"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier("features", ["a", "b"], in_channels=6, **options)


@pytest.mark.parametrize("name", ["resnet10_w16", "timm/test_resnet"])
def test_positions_of_the_map_of_any_network_are_instances(name: str) -> None:
    model = Classifier(name, ["a", "b"], pooling="abmil", tile_size=32).eval()
    image = torch.rand(1, 3, 64, 96)
    fmap = model.stream_network.module(model.stream_network.normalisation.unchecked(image, torch.float32))
    torch.testing.assert_close(model(image), model.head(fmap), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="encodes no patches"):
        _ = model.encoder
