"""Components that have the names of MMPretrain's are the same networks: numbers computed with version 1.2 and the same weights.

Weights are drawn in the order of the parameters, which is the same there.
"""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.components import DataSample
from widefield.registry import MODELS

ARCH = {"embed_dims": 16, "num_layers": 2, "num_heads": 2, "feedforward_channels": 32}
VIT: dict[str, Any] = {"arch": ARCH, "img_size": 32, "patch_size": 8}
BN = {"type": "BN1d"}
BACKBONE = {"type": "ResNet", "depth": 18, "stem_channels": 4, "base_channels": 4, "num_stages": 1}
PARTS: dict[str, Any] = {
    "backbone": {**BACKBONE, "out_indices": [0], "strides": [1], "dilations": [1]},
    "neck": {"type": "NonLinearNeck", "in_channels": 4, "hid_channels": 5, "out_channels": 6, "norm_cfg": BN},
}
PREDICTOR = {**PARTS["neck"], "in_channels": 6, "with_avg_pool": False}
PREDICT = {"type": "LatentPredictHead", "loss": {"type": "CosineSimilarityLoss"}, "predictor": PREDICTOR}
CORRELATE = {"type": "LatentCrossCorrelationHead", "in_channels": 6, "loss": {"type": "CrossCorrelationLoss"}}
CONTRAST = {"type": "CrossEntropyLoss", "loss_weight": 1.4}
SWAV_LOSS = {"type": "SwAVLoss", "feat_dim": 6, "num_crops": [2, 2], "num_prototypes": 7, "epsilon": 0.2}


def drawn(parameters: Iterable[nn.Parameter], generator: torch.Generator) -> None:
    for parameter in parameters:
        values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = values - (0.5 if parameter.ndim > 1 else 0.0)


def made(**description: Any) -> Any:
    module = MODELS.build(description).double()
    drawn(module.parameters(), torch.Generator().manual_seed(0))
    return module


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NETWORKS: list[tuple[dict[str, Any], float, float]] = [
    ({"type": "ResNetV1c", "depth": 18, "stem_channels": 8, "base_channels": 4}, 89.1381529730421, 89.1381529730421),
    ({"type": "ResNetV1d", "depth": 18, "stem_channels": 8, "base_channels": 4}, 89.10067560209049, 89.10067560209049),
    ({"type": "MobileNetV3", "arch": "small_075"}, 600.1726787615218, 650.7686709250074),
    ({"type": "MobileNetV3", "arch": "small_050"}, 266.1966917018656, 302.5936762679313),
    ({"type": "EfficientNet", "out_indices": [4]}, 489.4782085732658, 1933.8085018605896),
    ({"type": "MoCoV3ViT", **VIT}, 8.794714787931937, 10.846940849458758),
    (
        {"type": "VisionTransformer", **VIT, "patch_cfg": {"stride": 4, "padding": 2, "bias": False}},
        5.618428402193366,
        10.177612484915832,
    ),
    (
        {"type": "VisionTransformer", **VIT, "layer_cfgs": {"act_cfg": {"type": "QuickGELU"}}},
        8.794394231417867,
        10.84970189564452,
    ),
]
"""Descriptions, the sum of their output, and the sum of its absolute values."""


@pytest.mark.parametrize(("description", "total", "size"), NETWORKS)
def test_a_backbone_computes_what_that_of_its_name_computes(
    description: dict[str, Any], total: float, size: float
) -> None:
    with torch.no_grad():
        out = made(**description).eval()(random(1, 3, 32, 32))[0]
    assert [out.sum().item(), out.abs().sum().item()] == pytest.approx([total, size], rel=1e-9)


LEARNERS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "SimSiam": ({**PARTS, "head": PREDICT}, [-0.216294994, -0.245152698, -0.260578106]),
    "BYOL": ({**PARTS, "head": PREDICT, "base_momentum": 0.3}, [-0.865179977, -1.39544723, -1.747645975]),
    "BarlowTwins": ({**PARTS, "head": CORRELATE}, [8.380553242, 10.481465889, 0.145960137]),
    "MoCoV3": (
        {
            **PARTS,
            "head": {"type": "MoCoV3Head", "predictor": PREDICTOR, "loss": CONTRAST, "temperature": 0.7},
            "base_momentum": 0.2,
        },
        [4.527526452, 4.126188946, 3.866148742],
    ),
    "SwAV": (
        {
            **PARTS,
            "neck": {"type": "SwAVNeck", "in_channels": 4, "hid_channels": 5, "out_channels": 6, "norm_cfg": BN},
            "head": {"type": "SwAVHead", "loss": SWAV_LOSS},
        },
        [4.762690113, 3.965634057, 4.37280758],
    ),
}
"""Losses of three steps of gradient descent, in a run of four."""


@pytest.mark.parametrize("name", LEARNERS)
def test_a_learner_has_the_losses_of_that_of_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    description, losses = LEARNERS[name]
    model = MODELS.build({"type": name, **description}).double().train()
    generator = torch.Generator().manual_seed(0)
    neck = model.neck
    if name == "SwAV":  # there the norm is a part of the neck itself too, and comes first
        neck = nn.ModuleList([neck.projection_neck[k] for k in (1, 0, 3)])
    for part in (model.backbone, neck, model.head):
        drawn(part.parameters(), generator)
    weights = [one for part in (model.backbone, neck, model.head) for one in part.parameters()]
    generator = torch.Generator().manual_seed(1)
    sides = (16, 16, 12, 12) if name == "SwAV" else (16, 16)
    views = [torch.rand(4, 3, side, side, generator=generator, dtype=torch.float64) for side in sides]
    if hasattr(model, "base_momentum"):
        monkeypatch.setattr(model, "_steps_of_run", lambda: 4)
    found = []
    for _ in losses:
        loss = model.loss(views, [])["loss"]
        found.append(loss.item())
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= 0.5 * gradient
    assert found == pytest.approx(losses, rel=1e-7)


QUEUED = [0.958865515628, 0.775410078917, 0.798432905255, 0.775813741665, 0.920136357433]
"""Losses of five batches of SwAVLoss there, which has a queue of two batches; what is left in it sums to the next number."""
IN_QUEUE = 0.29835826553698264


def test_swav_with_a_queue_has_the_losses_of_that_of_its_name() -> None:
    loss = MODELS.build({**SWAV_LOSS, "num_crops": [2, 1], "num_prototypes": 5, "epsilon": 0.05, "queue_length": 8})
    loss.double().prototypes.weight.data = torch.sin(torch.arange(30.0, dtype=torch.float64) * 0.7).reshape(5, 6)
    batches = [torch.cos(torch.arange(72.0, dtype=torch.float64) * 1.3 + k).reshape(12, 6) for k in range(5)]
    batches = [nn.functional.normalize(batch, dim=1) for batch in batches]
    assert [loss(batch).item() for batch in batches] == pytest.approx(QUEUED, rel=1e-9)
    assert loss.queue.sum().item() == pytest.approx(IN_QUEUE, rel=1e-9)
    with pytest.raises(AssertionError, match="queue_length=8 must be at least 12, the images of a batch"):
        loss(torch.cat([batches[0]] * 3))
    before = loss.queue.clone()
    loss.eval()(batches[1])
    assert torch.equal(loss.queue, before)


def test_swav_begins_its_queue_and_thaws_its_prototypes_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    head = {"type": "SwAVHead", "loss": {**SWAV_LOSS, "queue_length": 4}}
    parts = {**LEARNERS["SwAV"][0], "head": head}
    model = MODELS.build({"type": "SwAV", **parts, "epoch_queue_starts": 1, "frozen_layers_cfg": {"prototypes": 2}})
    model._trainer = object()
    filled, trains = [], []
    for step in range(3):
        monkeypatch.setattr(type(model), "current_epoch", step)
        monkeypatch.setattr(type(model), "global_step", step)
        model.zero_grad()
        model.loss([torch.rand(4, 3, side, side) for side in (16, 16, 12, 12)], [])["loss"].backward()
        model.on_before_optimizer_step(None)
        filled.append(bool(model.head.loss_module.queue.any()))
        trains.append(model.head.loss_module.prototypes.weight.grad is not None)
        assert model.backbone.conv1.weight.grad is not None
    assert filled == [False, True, True]
    assert trains == [False, False, True]
    with pytest.raises(AssertionError, match="no parameter has 'prototype_' in its name"):
        MODELS.build({"type": "SwAV", **parts, "frozen_layers_cfg": {"prototype_": 2}})


def test_learners_refuse_what_they_cannot_compare() -> None:
    model = made(type="SimSiam", **LEARNERS["SimSiam"][0])
    for name in ("SimSiam", "SwAV"):
        with pytest.raises(AssertionError, match=r"give a list"):
            made(type=name, **LEARNERS[name][0]).loss(random(4, 3, 16, 16), [])
    with pytest.raises(AssertionError, match="SimSiam needs a head"):
        made(type="SimSiam", **PARTS)
    assert model.with_neck
    assert model.with_head


def test_generalised_means_are_between_average_and_maximum() -> None:
    maps = random(2, 5, 3, 4) - 0.3
    neck = MODELS.build({"type": "GeneralizedMeanPooling", "p": 2.5})
    expected = ((maps.clamp(min=1e-6) ** 2.5).mean((2, 3))) ** (1 / 2.5)
    torch.testing.assert_close(neck((maps,))[0], expected)
    torch.testing.assert_close(neck(maps), expected)
    with pytest.raises(AssertionError, match=r"p=0\.5 must be at least 1"):
        MODELS.build({"type": "GeneralizedMeanPooling", "p": 0.5})


def test_stacked_linear_layers_have_norm_and_activation_between_them() -> None:
    head = made(type="StackedLinearClsHead", num_classes=3, in_channels=6, mid_channels=[5], norm_cfg=BN).eval()
    x, (hidden, last) = random(4, 6), head.layers
    between = (x @ hidden.fc.weight.T + hidden.fc.bias) / (1 + 1e-5) ** 0.5 * hidden.norm.weight + hidden.norm.bias
    torch.testing.assert_close(head.pre_logits((x,)), between.relu())
    torch.testing.assert_close(head((x,)), between.relu() @ last.fc.weight.T + last.fc.bias)
    with pytest.raises(AssertionError, match="mid_channels is empty"):
        made(type="StackedLinearClsHead", num_classes=3, in_channels=6, mid_channels=[])


@pytest.mark.parametrize("options", [{}, {"margins": [0.3, 0.5, 1.2], "num_subcenters": 2}, {"easy_margin": True}])
def test_margins_widen_the_angle_to_the_true_class_in_the_loss_alone(options: dict[str, Any]) -> None:
    head = made(type="ArcFaceClsHead", num_classes=3, in_channels=6, scale=8.0, **options)
    x, labels = random(4, 6) - 0.5, torch.tensor([0, 2, 1, 2])
    centres = functional.normalize(head.norm_product.weight)
    cosine = (functional.normalize(x) @ centres.T).unflatten(1, (3, -1)).amax(2)
    torch.testing.assert_close(head((x,)), 8 * cosine)
    for row, label in enumerate(labels.tolist()):
        margin = torch.as_tensor(options.get("margins", [0.5] * 3)[label], dtype=torch.float64)
        angle = cosine[row, label].acos()
        wider = (angle + margin).cos()
        if options.get("easy_margin"):
            wider = wider if cosine[row, label] > 0 else cosine[row, label]
        elif angle + margin > torch.pi:
            wider = cosine[row, label] - margin * margin.sin()
        cosine[row, label] = wider
    samples = [DataSample().set_gt_label(label) for label in labels]
    expected = functional.cross_entropy(8 * cosine, labels)
    torch.testing.assert_close(head.loss((x,), samples)["loss"], expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(AssertionError, match="2 margins for 3 classes"):
        head.set_margins([0.1, 0.2])
