"""Weight initialisation by description."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from widefield.components import Component


class Part(Component):
    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(64, 128, 3)
        self.norm = nn.BatchNorm2d(128)
        self.fc = nn.Linear(128, 256)


class Whole(Component):
    def __init__(self, init_cfg: Any = None, part_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        self.parts = nn.ModuleList([nn.Sequential(Part(part_cfg))])
        self.fc = nn.Linear(4, 4)


def made(init_cfg: Any) -> Part:
    torch.manual_seed(0)
    part = Part(init_cfg)
    part.init_weights()
    return part


def test_without_a_description_weights_stay_as_they_are() -> None:
    torch.manual_seed(0)
    plain = Part()
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    plain.init_weights()
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())


FAN_IN, FAN_OUT = 64 * 9, 128 * 9


@pytest.mark.parametrize(
    ("cfg", "std", "bound"),
    [
        ({"type": "Xavier"}, (2 / (FAN_IN + FAN_OUT)) ** 0.5, None),
        ({"type": "Xavier", "gain": 3, "distribution": "uniform"}, None, 3 * (6 / (FAN_IN + FAN_OUT)) ** 0.5),
        ({"type": "Normal", "std": 0.1}, 0.1, None),
        ({"type": "TruncNormal", "std": 1.0, "a": -0.5, "b": 0.5}, None, 0.5),
        ({"type": "Uniform", "a": -0.3, "b": 0.3}, 0.3 / 3**0.5, 0.3),
        ({"type": "Kaiming"}, (2 / FAN_OUT) ** 0.5, None),
        ({"type": "Kaiming", "mode": "fan_in", "distribution": "uniform"}, None, (6 / FAN_IN) ** 0.5),
        ({"type": "Caffe2Xavier"}, None, (3 / FAN_IN) ** 0.5),
    ],
    ids=str,
)
def test_a_distribution_has_its_spread_and_biases_their_value(
    cfg: dict[str, Any], std: float | None, bound: float | None
) -> None:
    part = made({**cfg, "layer": "Conv2d", "bias": 0.25})
    if std is not None:
        assert part.conv.weight.std().item() == pytest.approx(std, rel=0.02)
    if bound is not None:
        assert 0.99 * bound < part.conv.weight.abs().max().item() <= bound
    assert bool((part.conv.bias == 0.25).all())
    assert bool((part.fc.bias != 0.25).any())


def test_layers_are_chosen_by_the_names_of_their_classes_bases_included() -> None:
    part = made([{"type": "Constant", "val": 3, "bias": 2, "layer": ["_BatchNorm", "Linear"]}])
    assert bool((part.norm.weight == 3).all())
    assert bool((part.fc.bias == 2).all())
    assert part.conv.weight.unique().numel() > 1


def test_without_layers_all_are_set_and_fans_only_where_there_are_some() -> None:
    part = made({"type": "Constant", "val": 3})
    assert bool((part.conv.weight == 3).all() and (part.norm.weight == 3).all())
    part = made({"type": "Kaiming", "bias": 7})
    assert bool((part.norm.weight == 1).all() and (part.conv.bias == 7).all())


def test_an_override_sets_a_part_by_name() -> None:
    override = {"type": "Constant", "name": "conv", "val": 5, "bias": 6}
    part = made({"type": "Constant", "val": 3, "layer": ["Conv2d", "Linear"], "override": override})
    assert bool((part.conv.weight == 5).all() and (part.conv.bias == 6).all() and (part.fc.weight == 3).all())
    part = made({"type": "Constant", "val": 3, "override": {"name": "fc"}})
    assert bool((part.fc.weight == 3).all())
    assert part.conv.weight.unique().numel() > 1
    with pytest.raises(ValueError, match="override of 'head': give the name of a part, one of conv, norm, fc"):
        made({"type": "Constant", "val": 3, "override": {"name": "head"}})


def test_the_parts_come_after_the_whole_however_deep() -> None:
    whole = Whole({"type": "Constant", "val": 1}, {"type": "Constant", "val": 2})
    whole.init_weights()
    assert bool((whole.fc.weight == 1).all() and (whole.parts[0][0].fc.weight == 2).all())


@pytest.mark.parametrize("wrapped", [False, True])
def test_pretrained_comes_last_and_wins(tmp_path: Path, wrapped: bool) -> None:
    saved = Whole({"type": "Constant", "val": 9})
    saved.init_weights()
    weights = {f"module.{key}": value for key, value in saved.state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 3} if wrapped else weights, tmp_path / "whole.pth")
    pretrained = {"type": "Pretrained", "checkpoint": str(tmp_path / "whole.pth")}
    whole = Whole([pretrained, {"type": "Constant", "val": 1}], {"type": "Constant", "val": 2})
    assert whole.is_pretrained
    whole.init_weights()
    assert bool((whole.fc.weight == 9).all() and (whole.parts[0][0].fc.weight == 9).all())


def test_a_prefix_selects_and_is_stripped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = made({"type": "Constant", "val": 9})
    weights = {f"backbone.{key}": value for key, value in saved.state_dict().items() if not key.startswith("fc")}
    save_file({**weights, "backbone.more": torch.ones(1), "head.fc.weight": torch.ones(1)}, tmp_path / "x.safetensors")
    with caplog.at_level(logging.WARNING):
        part = made({"type": "Pretrained", "checkpoint": str(tmp_path / "x.safetensors"), "prefix": "backbone."})
    assert bool((part.conv.weight == 9).all())
    assert "lacks: fc.weight, fc.bias" in caplog.text
    assert "has in excess: more" in caplog.text
    with pytest.raises(ValueError, match=r"no key begins with 'neck\.'; they begin with backbone\., head\."):
        made({"type": "Pretrained", "checkpoint": str(tmp_path / "x.safetensors"), "prefix": "neck"})
    with pytest.raises(
        ValueError, match=r"has no weight of Part: its names begin with 'backbone\.'; give prefix: backbone\."
    ):
        made({"type": "Pretrained", "checkpoint": str(tmp_path / "x.safetensors")})
    with pytest.raises(FileNotFoundError, match=r"gone\.pth does not exist"):
        made({"type": "Pretrained", "checkpoint": "gone.pth"})


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"type": "Kaimin"}, "no initialisation named 'Kaimin'; did you mean Kaiming"),
        ({"type": "Constant"}, "Constant needs val"),
        ({"type": "Normal", "sdt": 1}, "Normal has no argument 'sdt'; did you mean std"),
    ],
)
def test_a_wrong_description_is_refused(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        made(cfg)
