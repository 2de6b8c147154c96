"""Classifiers of components under Lightning."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from widefield.components import DataSample
from widefield.registry import MODELS

SMALL: dict[str, Any] = {
    "type": "ImageClassifier",
    "backbone": {"type": "ResNet", "depth": 18, "stem_channels": 4, "base_channels": 4},
    "neck": {"type": "GlobalAveragePooling"},
    "head": {"type": "LinearClsHead", "num_classes": 3, "in_channels": 32, "loss": {"type": "L1Loss"}},
    "train_cfg": {"augments": [{"type": "Mixup", "alpha": 0.8}, {"type": "CutMix", "alpha": 1.0}], "probs": [0.5, 0.5]},
    "data_preprocessor": {"mean": [120, 110, 100], "std": [60, 50, 40]},
}


def test_features_of_resnet18_at_224_pixels() -> None:
    description = {"type": "ResNet", "depth": 18, "out_indices": [0, 1, 2, 3]}
    head = {"type": "LinearClsHead", "num_classes": 10, "in_channels": 512}
    model = MODELS.build({**SMALL, "backbone": description, "head": head, "train_cfg": None}).eval()
    with torch.no_grad():
        image = torch.rand(1, 3, 224, 224)
        shapes = [tuple(one.shape[1:]) for one in model.extract_feat(image, stage="backbone")]
        assert shapes == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
        assert [one.shape[1:] for one in model.extract_feat(image)] == [(64,), (128,), (256,), (512,)]
        pre_logits = model.extract_feats([image, image], stage="pre_logits")
    assert [one.shape for one in pre_logits] == [(1, 512)] * 2


def test_two_steps_with_mixed_images_a_checkpoint_and_the_same_numbers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS.build(
        {**SMALL, "pretrained": "gone.pth"}
    )  # the checkpoint has the weights, so nobody looks for the file
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    loader = DataLoader(TensorDataset(images, torch.tensor([0, 1, 2, 0])), 2)
    shown = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **shown)
    trainer.fit(model, loader, loader)
    assert trainer.global_step == 2
    assert set(trainer.callback_metrics) == {"train_loss", "val_loss"}
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert {key: loaded.hparams[key] for key in SMALL if key != "type"} == {
        key: SMALL[key] for key in SMALL if key != "type"
    }
    before, after = (one.eval().predict(one.preprocess(images)[0]) for one in (model, loaded))
    assert all(torch.equal(one.pred_score, other.pred_score) for one, other in zip(before, after, strict=True))


def test_samples_without_labels_are_predicted() -> None:
    torch.manual_seed(0)
    model = MODELS.build({**SMALL, "train_cfg": None}).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    samples = [DataSample(img_path="a"), DataSample(img_path="b")]
    found = model.predict_step({"inputs": images, "data_samples": samples}, 0)
    assert [sample.img_path for sample in found] == ["a", "b"]
    assert found[0] is samples[0]
    assert found[0] is not found[1]
    with pytest.raises(ValueError, match="labels are class indices"):
        model.preprocess((images, torch.rand(2)))
    with pytest.raises(ValueError, match="a score from 0 to 1 for each class"):
        model.preprocess((images, torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.5, 0.5]])))
    _, taken = model.preprocess((images, torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])))
    assert [sample.gt_score.tolist() for sample in taken] == [[0, 1, 1], [0, 0, 0]]


def test_pixels_are_normalised_in_32_bits_at_least() -> None:
    preprocessor = MODELS.build({"type": "ClsDataPreprocessor", "mean": 123.675, "std": 58.395})
    image = torch.full((1, 3, 2, 2), 124, dtype=torch.uint8)
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = preprocessor({"inputs": image})["inputs"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[0, 0, 0, 0].item(), (124 - 123.675) / 58.395, rtol=0.01, atol=0)
