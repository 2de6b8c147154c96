"""Distillation from an encoder of patches into a convolutional student that streams over slides."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch.nn import functional

import widefield
from tests.pretraining.tiny import TinyWrapper
from tests.slides import write_slides
from widefield.cli import main
from widefield.pretraining import METHODS, EmbeddingModel, Run
from widefield.pretraining.methods.distillation import PatchTeacher

TEACHER = "patches:timm/test_vit"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "vit.pt"
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return path


def test_the_teacher_sees_each_patch_by_itself_normalised_as_timm_says(weights: Path) -> None:
    options: dict[str, Any] = {"teacher": TEACHER, "teacher_args": {"size": 32}, "teacher_weights": weights}
    method: Any = METHODS.get("distillation")(EmbeddingModel(TinyWrapper()), Run(12, 100, 4, 10), **options)
    pixels = torch.rand(2, 3, 70, 96)
    normalize = Run(12, 100, 4, 10).normalize
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (normalize.mean, normalize.std))
    seen = method.companions[0].forward_features(((pixels - mean) / std) * method.scale + method.shift)["features"]
    net: Any = timm.create_model("test_vit", num_classes=0, checkpoint_path=str(weights)).eval()
    config = net.pretrained_cfg
    mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
    patch = functional.interpolate(
        pixels[1:, :, 32:64, 64:96], net.patch_embed.img_size, mode=config["interpolation"], antialias=True
    )
    assert seen.shape == (2, net.num_features, 2, 3)
    torch.testing.assert_close(seen[1, :, 1, 2], net((patch - mean) / std)[0], rtol=1e-4, atol=1e-5)
    pooled = method.companions[0].forward_pool({"features": seen})["pooled_features"]
    torch.testing.assert_close(pooled.flatten(1), seen.mean((2, 3)))


def test_a_student_learns_from_patches_of_slides_and_streams_over_them(weights: Path, tmp_path: Path) -> None:
    write_slides(tmp_path, 1, 512)
    call = ["pretrain", "--data", str(tmp_path / "images"), "--out", str(tmp_path / "run"), "--method", "distillation"]
    args = [
        f"method_args.teacher={TEACHER}",
        "method_args.teacher_args.size=32",
        f"method_args.teacher_weights={weights}",
    ]
    slides = ["slides.patch_size=96", "slides.patches_per_slide=2", "transform_args.image_size=64"]
    small = ["--epochs", "1", "--batch-size", "2", "num_workers=0", "accelerator=cpu"]
    assert main([*call, *args, *slides, *small, "--model", "timm/test_resnet"]) == 0
    exported = tmp_path / "run" / "exported_models" / "exported_last.pt"
    student = timm.create_model("test_resnet", num_classes=0, global_pool="", checkpoint_path=str(exported))
    fmap = widefield.stream(student, 256, verify=False)(widefield.open_image(tmp_path / "images" / "tumor_001.tif"))
    assert fmap.shape == (1, 96, 16, 16)


def test_a_teacher_of_patches_needs_weights_and_arguments_that_it_takes(weights: Path) -> None:
    with pytest.raises(ValueError, match="would have random weights"):
        PatchTeacher(TEACHER, {"size": 32})
    with pytest.raises(ValueError, match=r"teacher_args: .*sizes"):
        PatchTeacher(TEACHER, {"sizes": 32, "weights": weights})
