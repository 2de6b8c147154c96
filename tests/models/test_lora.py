"""Adapters in networks, against the formula, and what they refuse."""

import sys

import pytest
import torch
from torch import nn

from widefield.errors import MissingExtraError, WrongArgumentError
from widefield.models.lora import add_adapters, has_adapters, merged


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fc = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qkv(self.fc(x))


def test_an_adapter_adds_a_product_of_low_rank_to_layers_of_attention_and_freezes_the_rest() -> None:
    torch.manual_seed(0)
    net, x = Attention(), torch.rand(3, 6)
    weight, bias, before = net.qkv.weight.detach().clone(), net.qkv.bias.detach().clone(), net(x)
    add_adapters(net, 2)
    assert has_adapters(net)
    torch.testing.assert_close(net(x), before)  # at first they add nothing
    trained = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert trained == {"qkv.lora_A.default.weight", "qkv.lora_B.default.weight"}
    nn.init.normal_(net.qkv.lora_B["default"].weight)
    down, up = net.qkv.lora_A["default"].weight, net.qkv.lora_B["default"].weight
    assert (down.shape, up.shape) == ((2, 6), (18, 2))
    torch.testing.assert_close(net(x), net.fc(x) @ (weight + up @ down).T + bias)
    plain = merged(net)
    assert not has_adapters(plain)
    assert set(plain.state_dict()) == set(Attention().state_dict())
    torch.testing.assert_close(plain(x), net(x))
    assert has_adapters(net)


def test_a_network_without_attention_gets_adapters_in_all_linear_layers() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    add_adapters(net, 1)
    assert sum(hasattr(part, "lora_A") for part in net.modules()) == 2


def test_what_cannot_be_adapted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WrongArgumentError, match="Sequential has no linear layer to adapt"):
        add_adapters(nn.Sequential(nn.Conv2d(3, 3, 1)), 4)
    with pytest.raises(WrongArgumentError, match="lora=0 must be a positive rank"):
        add_adapters(Attention(), 0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'widefield\[lora\]'"):
        add_adapters(Attention(), 4)
