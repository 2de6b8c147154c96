"""DINOv2: class tokens, hidden patches, and class tokens apart from one another."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.pretraining.tiny import checkpoint, small, timm_vit, train, write_images
from tests.pretraining.tiny_vit import images, make, own_vit
from widefield.components.models.contrastive_models import follow, momentum_copy, rising
from widefield.pretraining.methods.base import for_run
from widefield.pretraining.methods.dinov2 import random_masks

DINOV2 = small("dinov2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def test_what_has_no_class_token_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a class token, and this VisionTransformer has none"):
        make("dinov2", timm_vit(class_token=False, global_pool="avg"))


def test_half_of_the_global_views_hide_a_tenth_to_a_half() -> None:
    torch.manual_seed(0)
    counts = random_masks(9, (10, 10), (0.1, 0.5), 0.5).flatten(1).sum(1).sort().values.tolist()
    assert counts[:4] == [0] * 4
    assert all(10 + 8 * k <= count <= 18 + 8 * k for k, count in enumerate(counts[4:]))
    assert random_masks(4, (10, 10), (0.7, 0.7), 1.0).flatten(1).sum(1).tolist() == [70] * 4


def test_how_much_is_hidden_can_be_told_and_class_tokens_and_patches_can_share_a_head() -> None:
    method = make("dinov2", timm_vit(), ibot_separate_head=False, mask_ratio_max=0.2, mask_probability=1.0, **DINOV2)
    assert method.patch_head is method.head and method.teacher_patch_head is method.teacher_head
    assert len(method.heads()) == 1
    assert (method.mask_ratios, method.mask_probability) == ((0.1, 0.2), 1.0)
    loss = method.loss([images(3, side) for side in (16, 16, 8)], 0)
    loss["loss"].backward()
    assert loss["train_loss/ibot"] > 0 and method.head.layers[0].weight.grad is not None
    for wrong in ({"mask_ratio_min": 0.6}, {"mask_ratio_min": 0.0}, {"mask_probability": 0.0}):
        with pytest.raises(ValueError, match="must be above 0, and the first at most the second"):
            make("dinov2", timm_vit(), **wrong, **DINOV2)


@pytest.mark.parametrize("registers", [0, 2])
def test_the_loss_is_that_of_the_papers_in_double_precision(registers: int) -> None:
    torch.manual_seed(0)
    method = make("dinov2", timm_vit(reg_tokens=registers), steps=1000, **DINOV2).double()
    views = [images(3, side).double() for side in (16, 16, 8)]
    for center in (method.criterion.center, method.ibot.center.value):
        center.uniform_(-0.1, 0.1)
    dino_center, patch_center = method.criterion.center.clone(), method.ibot.center.value.clone()
    with torch.no_grad():
        method.head.layers[0].weight.mul_(1.5)  # the student is no longer the teacher
        method.patch_head.layers[0].weight.mul_(0.5)
    torch.manual_seed(7)
    results = method.loss(views, 20)
    torch.manual_seed(7)
    masks, prefix = random_masks(6, (4, 4), (0.1, 0.5), 0.5), 1 + registers
    temperature = 0.04 + 0.03 * 20 / 300
    assert results["schedule/teacher_temp"] == pytest.approx(temperature)

    def tokens(view: Any, mask: Any = None) -> Any:
        parts, side = method.transformer, view.shape[-1] // 4
        return parts.layers(parts.tokens(view, mask, method.mask_token), (side, side))[-1]

    teacher = [tokens(view) for view in views[:2]]
    student = [tokens(views[0], masks[:3]), tokens(views[1], masks[3:]), tokens(views[2])]
    dino, pairs = 0.0, 0
    for k, one in enumerate(teacher):
        target = ((method.teacher_head(one[:, 0]) - dino_center[0]) / temperature).softmax(-1)
        for n, other in enumerate(student):
            if k != n:
                dino -= (target * (method.head(other[:, 0]) / 0.1).log_softmax(-1)).sum(-1).mean()
                pairs += 1
    assert pairs == 4
    ibot = 0.0
    for view in range(2):
        for k in range(3):
            hidden = masks[3 * view + k].flatten()
            if not hidden.any():
                continue
            wanted = method.teacher_patch_head(teacher[view][k, prefix:][hidden]) - patch_center
            scores = method.patch_head(student[view][k, prefix:][hidden]) / 0.1
            ibot -= ((wanted / temperature).softmax(-1) * scores.log_softmax(-1)).sum(-1).mean() / 6
    koleo = 0.0
    for view in student[:2]:
        unit = F.normalize(view[:, 0], dim=-1)
        distance = torch.cdist(unit, unit) + torch.eye(3) * 9
        koleo -= distance.min(1).values.log().mean()
    for name, value in (("dino", dino / pairs), ("ibot", ibot), ("koleo", koleo)):
        torch.testing.assert_close(results[f"train_loss/{name}"], value.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(results["loss"], dino / pairs + ibot + 0.1 * koleo, rtol=1e-5, atol=0)


def test_the_teacher_follows_and_last_layers_wait() -> None:
    method = make("dinov2", own_vit(), **DINOV2)
    assert method.exported() is method.teacher_embedding
    weight = method.patch_head.layers[0].weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    method.before_step(0)
    torch.testing.assert_close(method.teacher_patch_head.layers[0].weight, before + 0.1)  # 10 of the 100 steps
    views = [images(), images()]
    for step, trains in ((9, False), (10, True)):
        method.zero_grad()
        method.loss(views, step)["loss"].backward()
        method.after_backward(step)
        assert all((head.last_layer.weight.grad is not None) == trains for head in (method.head, method.patch_head))
    assert all(p.grad is None for p in method.teacher_embedding.parameters())


@pytest.mark.parametrize("model", [timm_vit, own_vit])
def test_layers_near_the_pixels_learn_more_slowly(model: Any) -> None:
    method = make("dinov2", model(), **DINOV2, layer_decay=0.5)
    groups = method.parameter_groups(0.1)
    assert len({group["name"] for group in groups}) == len(groups)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = [p for p in method.parameters() if p.requires_grad]
    assert len(found) == len(trained) == sum(len(group["params"]) for group in groups)
    opened = method.transformer.model
    layers = opened.blocks if model is timm_vit else opened.layers
    assert {found[id(p)][0] for p in opened.patch_embed.parameters()} == {0.5**4}
    assert found[id(opened.cls_token)] == (0.5**4, 0.0)
    for k, layer in enumerate(layers):
        assert {found[id(p)] for p in layer.parameters()} == {(0.5 ** (3 - k), 0.1), (0.5 ** (3 - k), 0.0)}
    assert {found[id(p)][0] for p in method.head.parameters() if p.requires_grad} == {1.0}


def test_weight_decay_rises_and_layers_keep_their_share_of_the_learning_rate(tmp_path: Path, data: Path) -> None:
    method = make("dinov2", timm_vit(), steps=100, **DINOV2)
    assert [method.weight_decay(0.04, step) for step in (0, 50, 100, 200)] == pytest.approx([0.04, 0.22, 0.4, 0.4])
    assert method.weight_decay(0.0, 50) == 0
    train(tmp_path, data, "dinov2", model=timm_vit(), epochs=2)
    (optimizer,) = checkpoint(tmp_path)["optimizer_states"]
    groups = {group["name"]: group for group in optimizer["param_groups"]}
    last = 0.04 * (1 + 9 * (1 - math.cos(math.pi * 3 / 4)) / 2)  # in the last of 4 steps
    assert groups["params"]["weight_decay"] == pytest.approx(last)
    assert groups["params_no_weight_decay"]["weight_decay"] == 0
    assert groups["params_lr_0.6561"]["initial_lr"] == pytest.approx(0.9**4 * groups["params"]["initial_lr"])


def test_epochs_are_as_many_as_125000_steps_take(tmp_path: Path, data: Path) -> None:
    train(tmp_path, data, "dinov2", model=timm_vit(), epochs="auto", trainer_args={"max_steps": 1})
    images = len(list(data.rglob("*.png")))
    assert f"epochs: {math.ceil(125_000 * 4 / images)}\n" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize("steps", [40, 160, 1000])
def test_a_teacher_forgets_the_untrained_model_in_short_runs_too(steps: int) -> None:
    student = torch.nn.Linear(1, 1).double().requires_grad_(False)
    torch.nn.init.ones_(student.weight)
    teacher = momentum_copy(student)
    torch.nn.init.zeros_(student.weight)
    momentum = for_run(0.996, steps)
    for step in range(steps):
        follow([(student, teacher)], rising(step, steps, momentum))
    assert 0 < float(teacher.weight) < 0.01
    assert for_run(0.996, 10**6) == 0.996
    assert make("dinov2", own_vit(), steps=10**6, **DINOV2).momentum == 0.992
