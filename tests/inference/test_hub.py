"""Trained models in folders of their own, and on a stand-in for the Hugging Face Hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import widefield
from tests.label_files import write_segmented
from tests.pretraining.tiny import train, write_images
from widefield.cli import main
from widefield.inference import info_of
from widefield.inference.models import ModelInfo, set_info
from widefield.models import Classifier, Segmenter

IMAGE = torch.rand(1, 3, 70, 90, generator=torch.Generator().manual_seed(0))
NAMES = ["benign", "malignant"]


def classifier(**options: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier("resnet18_w8", NAMES, value_range=(0, 2), **options).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a classifier."""
    model = classifier()
    set_info(model, ModelInfo(tuple(NAMES), {"spacing": 0.5}, pixels=(3, "uint8"), foreground="otsu"))
    return widefield.save_pretrained(model, tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of `fit --task segment`, beside its images."""
    folder = tmp_path_factory.mktemp("run")
    write_segmented(folder)
    places = ("--images", str(folder / "images"), "--masks", str(folder / "masks"), "--out", str(folder / "run"))
    options = ("--model", "timm/test_resnet", "--tile-size", "48", "--epochs", "1")
    assert main(["fit", "--task", "segment", *places, *options]) == 0
    return folder / "run"


def test_a_classifier_comes_back_with_its_numbers_and_how_its_images_are_opened(saved: Path) -> None:
    model = widefield.get_model(saved, tile_size=64)
    with torch.no_grad():
        assert torch.equal(model(IMAGE), classifier(tile_size=64)(IMAGE))
    info = info_of(model)
    assert (info.class_names, info.opening, info.pixels) == (tuple(NAMES), {"spacing": 0.5}, (3, "uint8"))
    assert info.foreground == "otsu" and model.stream_network.normalisation.value_range == (0, 2)
    assert {path.name for path in saved.iterdir()} == {"model.safetensors", "config.json", "README.md"}


def test_the_card_tells_how_images_are_read_and_what_a_slide_takes(saved: Path) -> None:
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\n") and "library_name: widefield" in card
    for part in ("0.5 micrometres per pixel", "0.485", "0, 2", "1. malignant", "otsu", "8192", "memory: total"):
        assert part in card, part


def test_the_best_epoch_of_a_run_is_saved_with_its_metrics_and_predicts_as_the_run_does(
    run: Path, tmp_path: Path
) -> None:
    folder = widefield.save_pretrained(run, tmp_path / "hub")
    expected, found = widefield.get_model(run), widefield.get_model(str(folder))
    assert isinstance(found, Segmenter) and found.hparams == expected.hparams
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in found.state_dict().items())
    assert info_of(found).opening == info_of(expected).opening and info_of(found).pixels == (3, "uint8")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "val_mean_iou" in card and "3 x 64 x 72" in card and "level 0" in card
    image = str(run.parent / "images" / "im0.png")
    for checkpoint in (run, folder):
        arguments = ["predict", "--checkpoint", str(checkpoint), "--out", str(tmp_path / checkpoint.name), image]
        assert main(arguments) == 0
    rows = [(tmp_path / name / "predictions.csv").read_text(encoding="utf-8") for name in ("run", "hub")]
    assert rows[0] == rows[1]


def test_a_pretrained_backbone_comes_back_from_its_name_and_weights(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 4, side=40)
    arguments = {"depth": 18, "base_channels": 4, "stem_channels": 4}
    train(tmp_path / "out", tmp_path / "images", model="widefield/ResNet", model_args=arguments)
    folder = widefield.save_pretrained(tmp_path / "out", tmp_path / "hub")
    found = widefield.get_model(folder)
    expected = widefield.load_model(tmp_path / "out" / "checkpoints" / "last.ckpt")
    with torch.no_grad():
        assert torch.equal(found(IMAGE)[-1], expected(IMAGE)[-1])
    assert "simclr" in (folder / "README.md").read_text(encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model"]["args"]["norm_cfg"] = {"type": "os.system"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"os\.system.* is imported from elsewhere"):
        widefield.get_model(folder)


class _Hub:
    """A hub that is a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, dict[str, Any]()

    def api(self, **options: Any) -> "_Hub":
        self.asked |= options
        return self

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.asked |= options
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
        self.asked |= options
        shutil.copytree(folder_path, self.root / repo_id)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.asked |= options
        if not (self.root / repo_id).is_dir():
            raise FileNotFoundError(f"404: there is no {repo_id}")
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Hub:
    made = _Hub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", made.api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


def test_a_model_goes_to_the_hub_and_comes_back_by_its_name(hub: _Hub) -> None:
    where = widefield.push_to_hub(classifier(), "someone/slides", private=True, token="a", revision="v1")
    assert where == "https://hub/someone/slides/commit/1"
    assert hub.asked["private"] and hub.asked["token"] == "a" and hub.asked["revision"] == "v1"
    model = widefield.get_model("hf-hub:someone/slides@v2", tile_size=64)
    with torch.no_grad():
        assert torch.equal(model(IMAGE), classifier(tile_size=64)(IMAGE))
    assert hub.asked["revision"] == "v2" and hub.asked["allow_patterns"] == ["config.json", "model.safetensors"]


def test_what_the_hub_refuses_is_told_with_what_to_do(hub: _Hub) -> None:
    with pytest.raises(OSError, match=r"hf-hub:no/one cannot be fetched \(.*404.*give the folder"):
        widefield.get_model("hf-hub:no/one")
    hub.upload_folder(repo_id="is/there", folder_path=Path(__file__).parent)
    with pytest.raises(OSError, match=r"could not be uploaded to 'is/there' \(FileExistsError.*hf auth login"):
        widefield.push_to_hub(classifier(), "is/there")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors; download"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "cannot be read as safetensors"),
        (lambda folder: (folder / "config.json").write_text('{"format'), "is no JSON .* damaged"),
        (lambda folder: (folder / "config.json").write_text('{"architecture": "resnet18"}'), "of another library"),
        (lambda folder: _change(folder, format=9), "format 9 .* install a newer Widefield"),
        (lambda folder: _change(folder, kind="Other"), "kind 'Other'"),
        (lambda folder: _change(folder, model={"model_name": "resnet18_w8"}), "does not describe a Classifier"),
        (lambda folder: _change(folder, model=_model(folder) | {"weights": "x.pt"}), "no argument 'weights'"),
        (lambda folder: _change(folder, model=_model(folder) | {"model_name": "resnet10_w16"}), "is no checkpoint of"),
        (lambda folder: _change(folder, model=_model(folder) | {"model_name": "x"}), "no model 'x'"),
        (lambda folder: _change(folder, images={}), "does not describe a Classifier"),
    ],
    ids=[
        *("no weights", "damaged weights", "damaged configuration", "of timm", "a later format", "an unknown kind"),
        *("too few arguments", "weights of its own", "another network", "an unknown network", "no images"),
    ],
)
def test_a_wrong_or_damaged_folder_is_one_clear_error(change: Any, message: str, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    change(folder)
    with pytest.raises((OSError, ValueError), match=message):
        widefield.get_model(folder)


def _model(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model"]
    return found


def _change(folder: Path, **parts: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | parts), encoding="utf-8")


def test_what_no_folder_could_make_anew_is_refused_and_a_folder_that_is_there_stays(
    saved: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="a Conv2d is not made by a name"):
        widefield.save_pretrained(nn.Conv2d(1, 1, 1), tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        widefield.save_pretrained(tmp_path / "run", tmp_path / "new")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        widefield.save_pretrained(classifier(), saved)
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine.txt").touch()
    assert widefield.save_pretrained(classifier(), tmp_path / "old", overwrite=True) == tmp_path / "old"
    assert not (tmp_path / "old" / "mine.txt").exists()


def test_a_run_of_components_is_refused_as_its_configuration_could_run_code(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"backbone": {}}}, tmp_path / "best.ckpt")
    with pytest.raises(ValueError, match=r"could run code of strangers\. Publish the run's config\.yaml"):
        widefield.save_pretrained(tmp_path, tmp_path / "new")
