"""`check` says of a model whether it streams exactly, and what stands in the way."""

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widefield.streaming import StreamingCNN
from widefield.streaming.check import Check, check


class Fn(nn.Module):
    """A strided convolution and a function of its map."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


class Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    for _ in range(4):
        tokens = F.scaled_dot_product_attention(tokens, tokens, tokens).tanh().exp()
    return tokens


def checked(model: nn.Module, **options: Any) -> Check:
    torch.manual_seed(0)
    return check(model, (3, 29, 33), **{"plan_shape": None, **options})


def net(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), *layers)


def test_a_local_network_is_exact_in_one_stage() -> None:
    result = checked(net(nn.Dropout(0.5), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)).train())
    assert (result.verdict, result.exact, result.stages, result.refused) == ("exact", True, 1, ())
    assert set(result.errors) == {"outputs", "outputs without gradients", "image gradient", "parameter gradients"}
    assert result.worst_error is not None
    assert 0 < result.worst_error < 1e-12
    assert result.streamed_fraction == 1.0
    assert "\n" not in result.summary
    assert result.summary == str(result).splitlines()[0]


def test_a_global_operation_makes_stages() -> None:
    result = checked(Fn(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid()))
    assert (result.verdict, result.exact, result.stages) == ("exact with stages", True, 2)
    assert "2 stages" in result.summary


def test_attention_leaves_an_exact_trunk_and_is_named() -> None:
    result = checked(Fn(attention))
    assert (result.verdict, result.exact) == ("exact trunk, rest whole", True)
    assert result.streamed_fraction < 0.95
    assert "what stands in the way" in str(result)
    assert result.refused[0].op in str(result)
    assert result.refused[0].remedy in str(result)


def test_a_local_operation_that_runs_whole_is_only_partly_streamed() -> None:
    result = checked(Fn(lambda x: x.cumsum(2).cos().exp()))
    assert (result.verdict, result.exact) == ("partly", False)
    assert result.refused[0].op == "aten.cumsum"


def test_control_flow_on_pixel_values_is_refused_with_a_remedy() -> None:
    result = checked(Fn(lambda x: x * 2 if x.max() > 0 else x), plan_shape=(3, 64, 64))
    assert (result.verdict, result.exact, result.errors, result.worst_error) == ("refused", False, {}, None)
    assert "control flow" in result.refused[0].remedy
    assert result.refused[0].remedy in str(result)
    assert result.plan is None
    assert result.no_plan


@pytest.mark.parametrize("kind", ["outputs", "image gradient", "parameter gradients"])
def test_wrong_numbers_are_reported(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = StreamingCNN.forward

    def wrong(self: StreamingCNN, image: Tensor) -> Tensor:
        if kind == "image gradient":  # the same values, another derivative
            image = image + 1e-6 * (image - image.detach())
        result: Tensor = right(self, image)
        if kind == "outputs":
            return result + 1e-6
        weight = next(self.module.parameters())
        return result + 1e-3 * (weight - weight.detach()).sum() if kind == "parameter gradients" else result

    monkeypatch.setattr(StreamingCNN, "forward", wrong)
    result = checked(net())
    assert (result.verdict, result.exact) == ("WRONG", False)
    wrong_ones = [name for name, error in result.errors.items() if error > 1e-10]
    assert wrong_ones == (["outputs", "outputs without gradients"] if kind == "outputs" else [kind])
    if kind == "parameter gradients":
        assert result.worst_parameter == "0.weight"
        assert "0.weight" in str(result)


def test_missing_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamingCNN, "forward", lambda self, image: [self.module(image)])
    assert checked(net()).verdict == "WRONG"
    monkeypatch.setattr(StreamingCNN, "forward", lambda self, image: self.module(image) * float("nan"))
    assert checked(net()).errors["outputs"] == float("inf")


def test_a_gradient_that_is_zero_but_for_rounding_is_not_wrong() -> None:
    result = checked(nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8), nn.Conv2d(8, 2, 3)))
    assert result.verdict == "exact with stages"


def test_amplified_rounding_is_told_from_errors() -> None:
    result = checked(Fn(lambda x: (1e7 * (x * x.mean((2, 3), keepdim=True))).sin()))
    assert result.verdict == "exact with stages"
    assert result.worst_error is not None
    assert result.worst_error > 1e-10
    assert set(result.rounding) == set(result.errors)
    assert "unit in the last place" in str(result)


def test_a_transposed_gradient_of_batch_norm_is_compared_with_the_right_one() -> None:
    norm = nn.BatchNorm2d(8).eval()
    result = checked(nn.Sequential(Fn(lambda x: x), norm, nn.Flatten(2), Transpose()))
    assert result.verdict == "exact"


def test_a_cache_of_computed_weights_does_not_stand_in_the_way() -> None:
    model = net()
    model.cache = {"bias": model[0].weight * 2}
    assert checked(model).verdict == "exact"


def test_outputs_may_be_a_tree_and_need_no_gradient() -> None:
    result = checked(Fn(lambda x: {"map": x, "pair": (x.detach() + 1, [x.argmax(1)]), "size": 3}))
    assert result.verdict == "exact"


def test_casts_to_float32_are_compared_in_float64() -> None:
    result = checked(Fn(lambda x: (x.float().exp() + x.to(torch.float32)).to(x.dtype)))
    assert result.verdict == "exact"


def test_the_model_stays_as_it_is() -> None:
    model = net(nn.Dropout(0.5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checked(model)
    assert all(part.training for part in model.modules())
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_plan_is_for_another_size_and_the_result_is_plain_data() -> None:
    result = checked(net(), plan_shape=(3, 4096, 8192), plan_tile_size=512)
    assert result.plan is not None
    assert result.plan.image_shape == (1, 3, 4096, 8192)
    assert "512 x 512" in str(result)
    data = json.loads(json.dumps(result.as_dict()))
    assert data["plan"]["tile_size"] == [512, 512]
    assert data["verdict"] == "exact"


def test_an_image_that_the_model_cannot_take_is_the_users_error() -> None:
    with pytest.raises(ValueError, match=r"cannot run on an image of shape \(1, 5, 29, 33\)"):
        check(net(), (5, 29, 33), plan_shape=None)
    with pytest.raises(ValueError, match="infinities"):
        checked(Fn(lambda x: x / 0))
    with pytest.raises(ValueError, match="channels, height, width"):
        check(net(), (3, 0, 33))


def test_a_model_that_differs_from_itself_is_not_exact() -> None:
    class Noise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * torch.rand(1)

    assert not check(Noise(), (3, 17, 19), plan_shape=None).exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_compared_with_their_own_rounding(dtype: torch.dtype) -> None:
    layers = [x for _ in range(6) for x in (nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *layers)
    assert check(model, (3, 61, 67), plan_shape=None, dtype=dtype).exact


def test_what_cannot_be_copied_is_shared() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.lock = threading.Lock()  # type: ignore[assignment]
    assert check(model, (3, 40, 32), plan_shape=None).exact
