"""Networks by name, and weights from files."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from widefield.models import RESNETS, Classifier, load_weights, make_model, read_checkpoint


def test_a_narrow_resnet_has_the_keys_of_torchvisions() -> None:
    wide, narrow = make_model("resnet18", 2, None), make_model("resnet18_w16", 2, None)
    assert set(narrow.state_dict()) == set(wide.state_dict())
    assert narrow.fc.in_features == 128
    assert narrow(torch.rand(2, 3, 64, 64)).shape == (2, 2)


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet81", "resnet18"), ("resnet18w16", "resnet18_w16"), ("timm/convnext_tini", "timm/convnext_tiny")],
)
def test_an_unknown_name_is_answered_with_near_ones(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"no model '{name}'; did you mean .*{near}"):
        make_model(name, 2, None)


def test_every_resnet_is_listed_once() -> None:
    assert len(set(RESNETS)) == len(RESNETS)
    assert {"resnet18", "resnet152", "wide_resnet50_2", "resnext50_32x4d", "resnet10_w16"} <= set(RESNETS)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_load_and_another_number_of_classes_keeps_the_classifier(tmp_path: Path, suffix: str) -> None:
    source, target = make_model("resnet10_w16", 5, None), make_model("resnet10_w16", 2, None)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": source.state_dict()}, path)
    else:
        save_file(source.state_dict(), path)
    classifier = target.fc.weight.detach().clone()
    load_weights(target, path)
    assert torch.equal(target.conv1.weight, source.conv1.weight)
    assert torch.equal(target.fc.weight, classifier)


def test_a_classifier_more_or_less_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "widefield")
    whole, path = make_model("timm/resnet10t", 2, None), tmp_path / "weights.pth"
    trunk = timm.create_model("resnet10t", num_classes=0)
    torch.save(trunk.state_dict(), path)
    load_weights(whole, path)
    assert torch.equal(next(whole.parameters()), next(trunk.parameters()))
    assert "has no classifier of these classes: fc.weight, fc.bias stay" in caplog.text.replace("stays random", "stay")
    torch.save(make_model("timm/resnet10t", 5, None).state_dict(), path)
    load_weights(trunk, path)
    assert "has a classifier, which is left out: fc.bias, fc.weight" in caplog.text


def test_a_checkpoint_of_pretraining_is_answered_with_the_file_of_its_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "widefield")
    for name, content in (
        ("checkpoints/last.ckpt", {"method.a": torch.zeros(1)}),
        ("exported_models/exported_last.pt", {}),
    ):
        (tmp_path / name).parent.mkdir()
        torch.save({"state_dict": content}, tmp_path / name)
    with pytest.raises(ValueError, match=r"exported_last\.pt holds its weights"):
        load_weights(make_model("resnet10_w16", 2, None), tmp_path / "checkpoints" / "last.ckpt")
    assert "stays random" not in caplog.text  # nothing was loaded


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save(make_model("resnet18_w16", 2, None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth is not for this network \(NarrowResNet\): it has, unlike"):
        load_weights(make_model("resnet10_w16", 2, None), tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text.pth cannot be read as tensors"):
        load_weights(make_model("resnet10_w16", 2, None), tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_weights(make_model("resnet10_w16", 2, None), tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        make_model("resnet10_w16", 2, str(tmp_path / "gone.pth"))


def test_a_timm_model_is_split_and_streams() -> None:
    torch.manual_seed(0)
    model = Classifier("timm/resnet10t", ["a", "b", "c"], tile_size=32).eval()
    with torch.no_grad():
        image = torch.rand(1, 3, 70, 90)
        plain = model.head(model.stream_network.module(model.stream_network.normalisation.apply(image, image.dtype)))
        torch.testing.assert_close(model(image), plain, rtol=1e-4, atol=1e-5)


def test_a_classifier_needs_two_classes_and_a_known_pooling() -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        Classifier("resnet10_w16", ["a"])
    with pytest.raises(ValueError, match="pooling='min'"):
        Classifier("resnet10_w16", ["a", "b"], pooling="min")  # type: ignore[arg-type]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="not a checkpoint that `widefield fit` wrote"):
        Classifier.from_checkpoint(path)
    path.write_bytes(b"half a checkpoint")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        read_checkpoint(path)
