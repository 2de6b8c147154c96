"""Optimizers and schedules that a configuration describes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from widefield.components.backbones.vision_transformer import VisionTransformer
from widefield.modules.optimization import ParameterOptions, make_optimizer, make_schedule, parameter_groups

SGD = {"type": "SGD", "lr": 1.0}
WARM_UP = {"type": "LinearLR", "start_factor": 0.25, "end": 3}
COSINE = {"type": "CosineAnnealingLR", "T_max": 4}


def rates(description: Any, steps_per_epoch: int, count: int) -> tuple[list[float], str]:
    optimizer = make_optimizer(SGD, nn.Linear(1, 1))
    schedule, interval = make_schedule(description, optimizer, steps_per_epoch)
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found, interval


def warm_up_and_cosine(warm: int, falls: int) -> np.ndarray:
    rise = 0.25 + 0.75 * np.arange(warm) / warm
    return np.concatenate([rise, 0.5 * (1 + np.cos(np.pi * np.arange(falls + 1) / falls))])


@pytest.mark.parametrize(
    ("description", "steps_per_epoch", "interval"),
    [
        ([WARM_UP, COSINE], 1, "epoch"),
        ([WARM_UP, {**COSINE, "begin": 3, "end": 7}], 1, "epoch"),
        ([{**WARM_UP, "convert_to_iter_based": True}, COSINE], 5, "step"),
        ([{**WARM_UP, "end": 15, "by_epoch": False}, COSINE], 5, "step"),
        ([{"type": "LinearLR", "start_factor": 0.25}, {**COSINE, "begin": 3}], 1, "epoch"),
        ([{**WARM_UP, "by_epoch": False}, {**COSINE, "by_epoch": False}], 5, "step"),
    ],
)
def test_a_warm_up_is_followed_by_a_cosine(description: Any, steps_per_epoch: int, interval: str) -> None:
    factor = steps_per_epoch if any(one.get("by_epoch", True) for one in description) else 1
    expected = warm_up_and_cosine(3 * factor, 4 * factor)
    found, stepped = rates(description, steps_per_epoch, len(expected))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert stepped == interval


def test_milestones_count_epochs_or_steps() -> None:
    one = {"type": "MultiStepLR", "milestones": [1, 2], "gamma": 0.1, "convert_to_iter_based": True}
    found, _ = rates(one, 2, 5)
    np.testing.assert_allclose(found, [1, 1, 0.1, 0.1, 0.01])
    found, _ = rates({**one, "by_epoch": False}, 2, 3)
    np.testing.assert_allclose(found, [1, 0.1, 0.01])


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ([{"type": "LinearLR"}, COSINE], "schedule 1 has no begin, and schedule 0 has no end"),
        ([WARM_UP, {**COSINE, "begin": 5}], "schedule 1 begins at 5; it must begin at 3, the end of schedule 0"),
        ([{**WARM_UP, "begin": 1}, COSINE], "schedule 0 begins at 1; it must begin at 0"),
        ([WARM_UP, {**COSINE, "end": 2}, COSINE], "schedule 2 begins at 2; it must begin after schedule 1, at 3"),
        ([WARM_UP, {"type": "ReduceLROnPlateau", "monitor": "x"}], "cannot follow or precede"),
        ({"type": "torch.optim.lr_scheduler.ReduceLROnPlateau"}, "what does it monitor"),
        ({"type": "CosineAnealingLR"}, "did you mean CosineAnnealingLR"),
    ],
)
def test_schedules_that_do_not_follow_each_other_are_refused(description: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(description, make_optimizer(SGD, nn.Linear(1, 1)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(nn.Linear(1, 4).weight[:, 0].detach())
        self.head = nn.Linear(4, 2)
        self.frozen = nn.Linear(1, 1).requires_grad_(False)


def by_name(model: nn.Module, options: ParameterOptions) -> dict[str, tuple[float, float]]:
    groups = parameter_groups(model, options, lr=0.5, weight_decay=0.25)
    found = {id(one): (group["lr"], group["weight_decay"]) for group in groups for one in group["params"]}
    assert len({tuple(group.items())[1:] for group in groups}) == len(groups)
    return {name: found[id(one)] for name, one in model.named_parameters() if id(one) in found}


def test_norms_biases_and_named_parameters_have_their_own_rates() -> None:
    keys = {"head": {"lr_mult": 10.0}, "head.bias": {"decay_mult": 3.0}}
    description = {"norm_decay_mult": 0.0, "bias_decay_mult": 0.5, "flat_decay_mult": 2.0, "custom_keys": keys}
    assert by_name(Model(), ParameterOptions.described(description)) == {
        "conv.weight": (0.5, 0.25),
        "conv.bias": (0.5, 0.125),
        "norm.weight": (0.5, 0.0),
        "norm.bias": (0.5, 0.0),
        "scale": (0.5, 0.5),
        "head.weight": (5.0, 0.25),
        "head.bias": (0.5, 0.75),
    }


def test_rates_fall_with_the_depth_of_layers() -> None:
    arch = {"embed_dims": 8, "num_layers": 2, "num_heads": 2, "feedforward_channels": 8}
    model = nn.Module()
    model.backbone = VisionTransformer(arch, img_size=16, patch_size=8)
    model.head = nn.Linear(8, 2)
    found = by_name(model, ParameterOptions(layer_decay_rate=0.5))
    depths = ("backbone.patch_embed", "backbone.layers.0", "backbone.layers.1", "head")
    rates = [{lr for name, (lr, _) in found.items() if name.startswith(prefix)} for prefix in depths]
    assert rates == [{0.0625}, {0.125}, {0.25}, {0.5}]
    with pytest.raises(ValueError, match=r"layer_decay_rate needs a backbone .*; Model does not"):
        by_name(Model(), ParameterOptions(layer_decay_rate=0.5))


def test_no_schedule_changes_a_fixed_rate() -> None:
    model = Model()
    options = ParameterOptions.described({"custom_keys": {"head": {"fix_lr": True, "lr_mult": 2.0}}})
    optimizer = make_optimizer({"type": "SGD", "lr": 1.0}, model, options)
    schedule, _ = make_schedule({"type": "StepLR", "step_size": 1, "gamma": 0.5}, optimizer)
    moved = []
    for _ in range(3):
        before = [model.conv.bias.detach().clone(), model.head.bias.detach().clone()]
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        schedule.step()
        after = (model.conv.bias, model.head.bias)
        moved.append([(old - new).mean().item() for old, new in zip(before, after, strict=True)])
    np.testing.assert_allclose(moved, [[1.0, 2.0], [0.5, 2.0], [0.25, 2.0]], rtol=1e-5)


def test_options_count_from_the_defaults_of_the_optimizer() -> None:
    options = ParameterOptions.described({"norm_decay_mult": 0.0, "custom_keys": {"conv": {"lr_mult": 0.1}}})
    groups = make_optimizer({"type": "AdamW"}, Model(), options).param_groups
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(1e-4, 1e-2), (1e-3, 0.0), (1e-3, 1e-2)}
    with pytest.raises(ValueError, match="no parameter has the custom key 'cnov' in its name"):
        make_optimizer(SGD, Model(), ParameterOptions.described({"custom_keys": {"cnov": {}}}))
