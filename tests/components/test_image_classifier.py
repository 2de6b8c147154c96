"""The model that puts backbone, neck and head together."""

from typing import Any

import pytest
import torch
from torch import nn

from widefield.components import DataSample
from widefield.components.models.base_model import BaseModel, total_loss
from widefield.registry import MODELS

DESCRIPTION: dict[str, Any] = {
    "type": "ImageClassifier",
    "backbone": {"type": "ResNet", "depth": 18, "stem_channels": 4, "base_channels": 4, "out_indices": [0, 1, 2, 3]},
    "neck": {"type": "GlobalAveragePooling"},
    "head": {"type": "LinearClsHead", "num_classes": 3, "in_channels": 32, "cal_acc": True},
}


def made(**changes: Any) -> Any:
    torch.manual_seed(0)
    return MODELS.build({**DESCRIPTION, **changes})


def test_features_of_every_stage() -> None:
    model, image = made(), torch.rand(2, 3, 64, 64)
    shapes = [tuple(one.shape[1:]) for one in model.extract_feat(image, stage="backbone")]
    assert shapes == [(4, 16, 16), (8, 8, 8), (16, 4, 4), (32, 2, 2)]
    assert [tuple(one.shape) for one in model.extract_feat(image)] == [(2, 4), (2, 8), (2, 16), (2, 32)]
    assert model.extract_feat(image, stage="pre_logits").shape == (2, 32)
    assert [one.shape[2:] for one in made(neck=None).extract_feat(image)] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    for error in (AssertionError, ValueError):
        with pytest.raises(error, match="No head or the head doesn't implement `pre_logits` method"):
            made(head=None).extract_feat(image, stage="pre_logits")
        with pytest.raises(error, match='Invalid output stage "head", please choose from'):
            model.extract_feat(image, stage="head")


def test_the_three_modes() -> None:
    model, image = made().eval(), torch.rand(2, 3, 40, 40)
    samples = [DataSample().set_gt_label(label) for label in (0, 2)]
    scores = model(image)
    losses = model(image, samples, mode="loss")
    assert losses["loss"].item() == pytest.approx(nn.functional.cross_entropy(scores, torch.tensor([0, 2])).item())
    predicted = model(image, samples, mode="predict")
    assert predicted[0] is samples[0]
    torch.testing.assert_close(predicted[1].pred_score, scores.softmax(1)[1])
    assert made(neck=None, head=None)(image)[3].shape == (2, 32, 2, 2)
    with pytest.raises(RuntimeError, match='Invalid mode "unknown"'):
        model(image, mode="unknown")
    with pytest.raises(ValueError, match="has no head"):
        made(head=None)(image, samples, mode="loss")


def test_two_necks_make_a_sequence() -> None:
    model = made(neck=[{"type": "torch.nn.Identity"}, {"type": "GlobalAveragePooling"}])
    assert model.extract_feat(torch.rand(2, 3, 40, 40))[-1].shape == (2, 32)


def test_pretrained_is_short_for_an_initialisation(tmp_path: Any) -> None:
    saved = made()
    torch.save({"state_dict": saved.state_dict()}, tmp_path / "model.ckpt")
    loaded = MODELS.build({**DESCRIPTION, "pretrained": str(tmp_path / "model.ckpt")})
    assert loaded.init_cfg["type"] == "Pretrained"
    loaded.init_weights()
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_the_total_is_the_sum_of_all_that_is_called_a_loss() -> None:
    numbers = {
        "loss_1": torch.tensor([1.0, 3.0]),
        "aux_loss": [torch.tensor(5.0), torch.tensor([1.0])],
        "accuracy": 50.0,
    }
    assert total_loss(numbers).item() == 2 + 5 + 1
    with pytest.raises(ValueError, match=r"loss\(\) returned accuracy; a loss is a number whose name contains 'loss'"):
        total_loss({"accuracy": 50.0})


def test_a_step_takes_tensors_lazy_images_labels_and_samples() -> None:
    from tests.components.lazy import Lazy

    model = made().eval()
    model.log_dict = lambda *_, **__: None
    pixels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    labels = torch.tensor([0, 2])
    lazy = model.training_step(([Lazy(one) for one in pixels], labels), 0)
    plain = model.training_step((pixels / 255, [DataSample().set_gt_label(int(label)) for label in labels]), 0)
    torch.testing.assert_close(lazy, plain)
    with pytest.raises(ValueError, match=r"shapes 3x40x20, 3x40x40; give images of one size, or data\.batch_size=1"):
        model.training_step(([Lazy(pixels[0]), Lazy(pixels[1, :, :, :20])], labels), 0)


def test_a_model_of_ones_own_writes_its_loss() -> None:
    class Mine(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 1)

        def loss(self, inputs: torch.Tensor, data_samples: Any) -> dict[str, Any]:
            return {"loss": self.fc(inputs).square(), "seen": len(data_samples)}

    model = Mine()
    model.log_dict = lambda *_, **__: None
    assert model.training_step((torch.ones(2, 4), torch.zeros(2, dtype=torch.long)), 0).ndim == 0
    assert len(model.configure_optimizers().param_groups[0]["params"]) == 2
