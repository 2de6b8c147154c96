"""What goes wrong in a described run is said in a line, and a run that is there stays as it was."""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn

from widefield.cli import main
from widefield.cli.fit_resuming import check_resumed
from widefield.components.data_sample import DataSample
from widefield.components.heads.classification_heads import LinearClsHead, VisionTransformerClsHead
from widefield.components.initializers import Pretrained
from widefield.registry import MODELS

CONFIG = """\
model:
  type: ImageClassifier
  data_preprocessor: {mean: [100, 100, 100], std: [50, 50, 50]}
  backbone: {type: ResNet_CIFAR, depth: 18, stem_channels: 4, base_channels: 4, num_stages: 1, out_indices: [0]}
  neck: {type: GlobalAveragePooling}
  head: {type: LinearClsHead, num_classes: 2, in_channels: 4}
data:
  type: Datasets
  train: {type: ImageFolder, root: images}
  val: {type: ImageFolder, root: images}
  batch_size: 2
trainer: {max_epochs: 1, enable_progress_bar: false}
"""
ANNOTATED = "data.train={_delete_: true, type: AnnotationFile, root: ., ann_file: labels.txt}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(2):
            Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
                tmp_path / "images" / name / f"{k}.png"
            )
    (tmp_path / "my.yaml").write_text(CONFIG)
    (tmp_path / "labels.txt").write_text("images/cats/0.png 0\nimages/dogs/0.png 7\n")
    shutil.copytree(tmp_path / "images", tmp_path / "grey")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "grey" / "cats" / "0.png")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.train.root=gone"], "fit: error: the folder of images gone does not exist\n"),
        (["data.train.root=images/cats"], "fit: error: images/cats has no sub-folders"),
        ([ANNOTATED, "data.val=null"], "the data has labels up to 7, that is 8 classes, and model.head.num_classes=2"),
        (["model.head.in_channels=5"], "in_channels=5 of the head, and it gets features of 4 channels"),
        (["model.neck=null"], "(2, 4, 16, 16), expected (N, 4); put a neck before it"),
        (
            ["model.head.loss={type: CrossEntropyLoss, class_weight: [1, 2, 3]}"],
            "class_weight=[1, 2, 3] must be a factor for each of 2 classes",
        ),
        (["model.backbone.base_channels=0"], "model.backbone.base_channels: got 0, expected int, at least 1"),
        (["data.train.root=grey"], "grey/cats/0.png has 1 channels, and others of its batch have 3"),
        (
            ["data.train.root=grey", "data.batch_size=1"],
            "mean and std have 3 values, the image has 1 channels",
        ),
        (
            ["trainer.callbacks=[{type: EarlyStopping, monitor: gone}]"],
            "trainer.callbacks: Early stopping conditioned on metric `gone`",
        ),
    ],
)
def test_what_data_and_model_do_not_share_is_said_in_a_line(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["fit", "--config", "my.yaml", "--out", "run", *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert "Union" not in error


def test_a_grey_image_among_colours_is_trained_on_as_rgb(folder: Path) -> None:
    assert (
        main(
            [
                "fit",
                "--config",
                "my.yaml",
                "--out",
                "run",
                "data.train.root=grey",
                "data.train.transforms=[{type: RGB}]",
            ]
        )
        == 0
    )


def test_a_run_that_does_not_fit_the_new_values_stays_as_it_was(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", "my.yaml", "--out", "run"]) == 0
    before = (folder / "run" / "config.yaml").read_bytes()
    assert main(["fit", "--resume", "--out", "run", "trainer.max_epochs=2", "model.backbone.depth=34"]) == 2
    assert "last.ckpt is of a run with other values:\n  model.backbone.depth was 18 and is 34" in capfd.readouterr().err
    assert (folder / "run" / "config.yaml").read_bytes() == before
    assert main(["fit", "--resume", "--out", "run", "trainer.max_epochs=2"]) == 0
    assert b"max_epochs: 2" in (folder / "run" / "config.yaml").read_bytes()


@pytest.mark.parametrize(
    ("schedule", "changed", "rate"),
    [
        (
            ["lr_scheduler={type: StepLR, step_size: 1, gamma: 0.5}"],
            ["optimizer.lr=1e-4", "optimizer.momentum=0.9", "lr_scheduler.gamma=0.1"],
            1e-6,
        ),
        ([], ["lr_scheduler={type: StepLR, step_size: 1, gamma: 0.1}"], 1e-5),
        (
            ["lr_scheduler=[{type: LinearLR, end: 1, start_factor: 0.1}, {type: CosineAnnealingLR, T_max: 4}]"],
            ["optimizer.lr=1e-4"],
            0.5 * (1 + 0.5**0.5) * 1e-4,
        ),
    ],
)
def test_a_resumed_run_takes_on_another_rate_and_schedule_as_if_it_had_had_them_from_the_start(
    folder: Path, schedule: list[str], changed: list[str], rate: float
) -> None:
    run = ["fit", "--config", "my.yaml", "optimizer={type: SGD, lr: 1e-3, momentum: 0.5}", *schedule]
    assert main([*run, "--out", "run"]) == 0
    assert main(["fit", "--resume", "--out", "run", "trainer.max_epochs=2", *changed]) == 0
    assert main([*run, "--out", "whole", "trainer.max_epochs=2", *changed]) == 0
    resumed, whole = (torch.load(folder / name / "last.ckpt", weights_only=True) for name in ("run", "whole"))
    groups = [state["optimizer_states"][0]["param_groups"][0] for state in (resumed, whole)]
    assert groups[0] == groups[1]
    assert resumed["lr_schedulers"] == whole["lr_schedulers"]
    assert groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize(
    ("section", "value", "is_free"),
    [
        ("trainer", {"max_epochs": 9, "precision": "bf16-mixed", "gradient_clip_val": 1.0, "devices": 2}, True),
        ("trainer", {"accumulate_grad_batches": 2}, False),
        ("trainer", {"callbacks": [{"type": "Timer", "duration": "1"}]}, True),
        ("trainer", {"callbacks": [{"type": "EarlyStopping", "monitor": "val_loss", "patience": 9}]}, False),
        ("trainer", {"callbacks": None}, True),
        ("model", {"lr": 0.1, "tile_size": 64, "backbone": {"depth": 18, "streaming": {"tile_size": 64}}}, True),
        ("model", {"weights": "other.pth"}, False),
        ("model", {"backbone": {"depth": 18, "norm_eval": True}}, False),
        ("data", {"images": "moved", "num_workers": 4, "train": {"root": "moved"}}, True),
        ("data", {"batch_size": 2}, False),
        ("data", {"train": {"root": "here", "transforms": [{"type": "RGB"}]}}, False),
        ("optimizer", {"type": "SGD", "lr": 0.1, "momentum": 0.9}, True),
        ("optimizer", {"type": "AdamW", "lr": 0.5}, False),
        ("lr_scheduler", {"type": "StepLR", "step_size": 2}, True),
        ("paramwise_cfg", {"norm_decay_mult": 0.0}, False),
        ("seed_everything", 1, False),
        ("metrics", [{"type": "Accuracy"}], True),
    ],
)
def test_what_a_resumed_run_may_change(section: str, value: Any, is_free: bool) -> None:
    early = {"type": "EarlyStopping", "monitor": "val_loss", "patience": 3}
    before: dict[str, Any] = {
        "trainer": {"max_epochs": 1, "accumulate_grad_batches": 1, "callbacks": [early]},
        "model": {"type": "ImageClassifier", "backbone": {"depth": 18}},
        "data": {"images": "here", "batch_size": 1, "train": {"root": "here"}},
        "optimizer": {"type": "SGD", "lr": 0.5},
        "seed_everything": 0,
    }
    check_resumed(before, copy.deepcopy(before), Path("last.ckpt"))
    after = {**before, section: {**before.get(section, {}), **value} if isinstance(value, dict) else value}
    if is_free:
        check_resumed(before, after, Path("last.ckpt"))
    else:
        with pytest.raises(
            ValueError, match=rf"(?s)last.ckpt is of a run with other values:\n  {section}.* was .* and is "
        ):
            check_resumed(before, after, Path("last.ckpt"))


def test_the_last_epoch_is_kept_though_it_is_not_the_best(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelCheckpoint, "check_monitor_top_k", lambda _, trainer, current: trainer.current_epoch == 0)
    assert main(["fit", "--config", "my.yaml", "--out", "run", "trainer.max_epochs=2"]) == 0
    steps = [torch.load(folder / "run" / f"{name}.ckpt", weights_only=True)["global_step"] for name in ("best", "last")]
    assert steps == [2, 4]


@pytest.mark.parametrize(
    ("argument", "name"), [("trainer.limit_val_batches=0", "last.ckpt"), ("trainer.max_epochs=0", None)]
)
def test_the_checkpoint_that_is_named_exists(
    folder: Path, capfd: pytest.CaptureFixture[str], argument: str, name: str | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's about the measure that is not there
        assert main(["fit", "--config", "my.yaml", "--out", "run", argument]) == 0
    shown = capfd.readouterr().err.replace("\n", "").replace(" ", "")
    assert (f"run/{name}" if name else "thereisnocheckpoint") in shown
    assert "best.ckpt" not in shown


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_finite_epoch(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = ["fit", "--config", "my.yaml", "--out", "run", "trainer.max_epochs=3"]
    assert (
        main([*run, "optimizer={type: SGD, lr: 1e-3}", "lr_scheduler={type: StepLR, step_size: 1, gamma: 1e38}"]) == 2
    )
    error = capfd.readouterr().err
    assert "the loss of step 4 (epoch 2) is NaN or infinite" in error
    assert "last.ckpt is that of the end of epoch 1, step 2, and its weights are finite" in error
    for name in ("last.ckpt", "best.ckpt"):
        state = torch.load(folder / "run" / name, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize("head", [LinearClsHead(2, 4), VisionTransformerClsHead(2, 4)])
def test_maps_whose_width_happens_to_fit_are_refused(head: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4, 4\), expected \(N, 4\)"):
        head((torch.zeros(1, 4, 4, 4),))


@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "LabelSmoothLoss", "FocalLoss", "L1Loss"])
def test_labels_beyond_the_scores_are_refused(loss: str) -> None:
    more = {"label_smooth_val": 0.1} if loss == "LabelSmoothLoss" else {}
    model = MODELS.build({"type": "ClsHead", "loss": {"type": loss, **more}})
    with pytest.raises(ValueError, match=r"label.* 3, and"):
        model.loss(torch.zeros(2, 3), [DataSample().set_gt_label(0), DataSample().set_gt_label(3)])


def test_weights_of_another_shape_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained, new = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 9)), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    Pretrained(checkpoint=str(tmp_path / "trained.pth"))(new)
    assert torch.equal(new[0].weight, trained[0].weight)
    assert "has in another shape, so they are not loaded: 1.weight, 1.bias" in caplog.text
    with pytest.raises(ValueError, match=r"no weight of Linear: weight has the shape \(9, 4\), expected \(2, 4\)"):
        Pretrained(checkpoint=str(tmp_path / "trained.pth"), prefix="1")(nn.Linear(4, 2))


def test_a_file_of_a_whole_model_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 3), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match="holds no state dict but a Linear; where the model can be made, save"):
        Pretrained(checkpoint=str(tmp_path / "whole.pth"))(nn.Linear(3, 3))


def test_initialisation_of_layers_that_there_are_not_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    given = [{"type": "Constant", "val": 1, "layer": name} for name in ("Conv2dd", "_BatchNorm", "GroupNorm")]
    head = MODELS.build({"type": "LinearClsHead", "num_classes": 2, "in_channels": 4, "init_cfg": given})
    head.init_weights()
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "init_cfg: no layer of LinearClsHead is a Conv2dd"
    ]


def test_floats_up_to_one_beside_a_mean_for_eight_bits_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for mean, image in (
        (100.0, torch.rand(1, 3, 4, 4)),
        (0.5, torch.rand(1, 3, 4, 4)),
        (100.0, 255 * torch.ones(1, 3, 4, 4)),
    ):
        preprocessor = MODELS.build({"type": "ClsDataPreprocessor", "mean": [mean] * 3, "std": [mean] * 3})
        preprocessor({"inputs": image})
        preprocessor({"inputs": list(image)})
    (record,) = caplog.records
    assert record.message.startswith("images are floats up to 1, and mean=[100.0, 100.0, 100.0] is in units of 8 bits;")
