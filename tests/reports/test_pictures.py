"""Grad-CAM of models of components, learning rates, confusion matrices, t-SNE."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from widefield.registry import MODELS
from widefield.reports import NoMapError, grad_cam, learning_rates, save_confusion_matrix, save_points, tsne

RESNET = {
    "type": "ResNet",
    "depth": 18,
    "stem_channels": 4,
    "base_channels": 4,
    "num_stages": 3,
    "strides": [1, 2, 2],
    "dilations": [1, 1, 1],
    "out_indices": [2],
}
CONVNEXT = {
    "type": "ConvNeXt",
    "arch": {"depths": [1, 1, 1, 1], "channels": [4, 4, 4, 8]},
    "gap_before_final_norm": False,
}
VIT = {
    "type": "VisionTransformer",
    "arch": {"embed_dims": 16, "num_layers": 2, "num_heads": 2, "feedforward_channels": 16},
    "img_size": 32,
    "patch_size": 8,
}


def classifier(backbone: dict[str, Any], channels: int, neck: bool = True) -> Any:
    torch.manual_seed(0)
    head = {"type": "LinearClsHead", "num_classes": 3, "in_channels": channels}
    model = MODELS.build(
        {
            "type": "ImageClassifier",
            "backbone": backbone,
            "neck": {"type": "GlobalAveragePooling"} if neck else None,
            "head": head,
        }
    )
    return model.eval()


def test_the_map_of_the_last_layer_is_the_class_activation_map() -> None:
    model, image = classifier(RESNET, 16), torch.rand(3, 64, 48)
    scores, evidence = grad_cam(model, image, class_index=2)
    with torch.no_grad():
        features = model.backbone(image[None])[0]
        expected = torch.einsum("k,khw->hw", model.head.fc.weight[2], features[0])
        torch.testing.assert_close(scores, model(image[None]).softmax(1)[0])
    torch.testing.assert_close(evidence, expected)
    torch.testing.assert_close(grad_cam(model, image, "backbone.layer3", 2)[1], expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)
    torch.testing.assert_close(grad_cam(model, image, "backbone.layer3", 2)[1], expected)


def test_an_inner_layer_is_explained_by_the_gradient_of_the_score() -> None:
    model, image = classifier(RESNET, 16), torch.rand(3, 48, 48)
    _, evidence = grad_cam(model, image, "backbone.layer1", 1)
    body = model.backbone
    activation = body.layer1(body.maxpool(body.relu(body.norm1(body.conv1(image[None])))))
    activation = activation.detach().requires_grad_()
    score = model.head(model.neck((body.layer3(body.layer2(activation)),)))[0, 1]
    (gradient,) = torch.autograd.grad(score, activation)
    expected = (gradient.sum((2, 3), keepdim=True) * activation).sum(1)[0]
    torch.testing.assert_close(evidence, expected.detach())


def test_a_streamed_backbone_is_explained_as_a_plain_one() -> None:
    plain, image = classifier(CONVNEXT, 8), torch.rand(3, 150, 130)
    streamed = classifier({**CONVNEXT, "streaming": {"tile_size": 64}}, 8)
    for one, other in zip(grad_cam(plain, image), grad_cam(streamed, image), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"the backbone streams, so that backbone\.stages never has its whole output"):
        grad_cam(streamed, image, "backbone.stages")


def test_tokens_are_laid_out_as_the_patches_were() -> None:
    model, image = classifier(VIT, 16, neck=False), torch.rand(3, 32, 32)
    tokens: list[torch.Tensor] = []
    model.backbone.layers[1].ln1.register_forward_hook(lambda part, given, output: tokens.append(output))
    _, evidence = grad_cam(model, image, class_index=0)
    assert evidence.shape == (4, 4)
    found = tokens[0].detach()[0, 1:]
    weights = torch.linalg.lstsq(found[:, :], evidence.reshape(-1)).solution
    torch.testing.assert_close((found @ weights).view(4, 4), evidence, atol=1e-4, rtol=1e-3)
    wide = classifier({**VIT, "img_size": [16, 64]}, 16, neck=False)
    assert grad_cam(wide, torch.rand(3, 16, 64))[1].shape == (2, 8)
    with pytest.raises(
        NoMapError, match=r"the output of backbone has the shape \(1, 16\), which is no map of the image"
    ):
        grad_cam(model, image, "backbone")
    with pytest.raises(NoMapError, match=r"ConvNeXt gives features of the shape .*gap_before_final_norm=False"):
        grad_cam(classifier({**CONVNEXT, "gap_before_final_norm": True}, 8, neck=False), image)


def test_learning_rates_are_those_of_torchs_schedules() -> None:
    sgd = {"type": "SGD", "lr": 0.1}
    rates = learning_rates(sgd, {"type": "MultiStepLR", "milestones": [2, 4], "gamma": 0.1}, 6)
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    cosine = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 4}}
    np.testing.assert_allclose(
        learning_rates(sgd, cosine, 5), 0.05 * (1 + np.cos(np.pi * np.arange(5) / 4)), atol=1e-12
    )
    assert learning_rates(sgd, None, 2) == [0.1, 0.1]
    by_step = {"type": "StepLR", "step_size": 6, "by_epoch": False}
    np.testing.assert_allclose(learning_rates(sgd, by_step, 3, steps_per_epoch=3), [0.1, 0.1, 0.01])
    with pytest.raises(ValueError, match="--steps-per-epoch"):
        learning_rates(sgd, by_step, 3)
    with pytest.raises(ValueError, match="ReduceLROnPlateau depends on what is measured"):
        learning_rates(sgd, {"type": "ReduceLROnPlateau", "monitor": "val_loss"}, 2)
    with pytest.raises(ValueError, match="no Optimizer named 'SDG'; did you mean SGD"):
        learning_rates({"type": "SDG"}, None, 2)


def test_a_confusion_matrix_is_a_picture(tmp_path: Path) -> None:
    for count in (2, 30):
        save_confusion_matrix(tmp_path / f"{count}.png", np.eye(count, dtype=int) * 3)
        assert (tmp_path / f"{count}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2.png", "30.png"]
    with pytest.raises(ValueError, match=r"of shape \(2, 2\) with 3 class names"):
        save_confusion_matrix(tmp_path / "no.png", np.eye(2), ["a", "b", "c"])


def test_digits_that_are_alike_lie_together(tmp_path: Path) -> None:
    images, labels = load_digits(n_class=2, return_X_y=True)
    points = tsne(images[:60])
    assert points.shape == (60, 2)
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (labels[:60][distances.argmin(1)] == labels[:60]).mean() > 0.9
    np.testing.assert_array_equal(tsne(images[:20], seed=1), tsne(images[:20], seed=1))
    save_points(tmp_path / "points.png", points, labels[:60].tolist(), ["zero", "one"])
    assert (tmp_path / "points.png").read_bytes().startswith(b"\x89PNG")
