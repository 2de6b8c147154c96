"""The comparison with the plain module at first use finds what the other defences would miss, and restores everything."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.streaming.test_effects import clamps_a_map_past_autograd, counts_in_a_class, recurrent
from tests.streaming.test_functions_and_hooks import FUNCTIONS, Reverse, backward_hook, backward_pre_hook, hooked
from tests.streaming.test_recapture import BRANCHES
from tests.streaming.unseen import IMAGE, Net
from widefield.streaming import StreamingCNN, VerificationError, capture, verification
from widefield.streaming.watch import Watch


def undefended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take out whatever looks for such faults, but the check at first use."""
    monkeypatch.setattr(capture, "refuse_structure", lambda *args: None)
    monkeypatch.setattr(capture, "refuse_changes", lambda changes, watch: None)
    monkeypatch.setattr(Watch, "_refuse_lost", lambda *args: None)
    monkeypatch.setattr(Watch, "_patched", lambda watch: iter(()))
    monkeypatch.setattr("widefield.streaming.verification._VERIFIED", {})


CAUGHT: dict[str, Callable[[], nn.Module]] = {
    "function": lambda: Net(FUNCTIONS["called"]),
    "function of a weight": lambda: Net(FUNCTIONS["of a weight"]),
    "straight-through": lambda: Net(FUNCTIONS["with a scale"]),
    "tensor hook": lambda: Net(hooked),
    "clamped map": lambda: Net(clamps_a_map_past_autograd),
    "counter": lambda: Net(counts_in_a_class),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_the_check_at_first_use_alone_finds_wrong_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    undefended(monkeypatch)
    net = CAUGHT[name]()
    with pytest.raises(VerificationError, match=r"streamed, .* plain|differ from each other"):
        StreamingCNN(net, 7)(IMAGE)
    assert all(p.grad is None for p in net.parameters())


# PyTorch 2.11 warns of the plain module too, the first layer of which gets an image without gradient.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("register", [backward_pre_hook, backward_hook])
def test_the_check_at_first_use_alone_finds_backward_hooks(register: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    undefended(monkeypatch)
    net = Net(lambda net, x: net.b(x))
    register(net)
    with pytest.raises(VerificationError, match="gradient of"):
        StreamingCNN(net, 7)(IMAGE)


def test_the_check_at_first_use_alone_finds_a_branch_on_the_grad_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    undefended(monkeypatch)
    streamed = StreamingCNN(Net(BRANCHES["grad mode"]), 7)
    streamed(IMAGE)
    with torch.no_grad(), pytest.raises(VerificationError, match="output 0 differs by 5"):
        streamed(IMAGE)


def test_the_check_at_first_use_alone_finds_a_result_that_the_next_forward_pass_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undefended(monkeypatch)
    with pytest.raises(VerificationError, match="in the second forward pass"):
        StreamingCNN(Net(recurrent), 7, unsupported="run_whole")(IMAGE)


def test_the_check_names_the_layer_where_a_difference_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    undefended(monkeypatch)
    with pytest.raises(VerificationError, match="between the result of layer 'a' and the output"):
        StreamingCNN(Net(lambda net, x: net.b(Reverse.apply(x))), 7)(IMAGE)
    net = Net(lambda net, x: net.b(x).relu())
    net.b.register_forward_hook(lambda module, args, out: out * (1 if torch.is_grad_enabled() else 2))
    streamed = StreamingCNN(net, 7)
    streamed(IMAGE)
    with torch.no_grad(), pytest.raises(VerificationError, match="begins at the result of layer 'b'"):
        streamed(IMAGE)


def test_the_check_restores_everything() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(4, 2, 3))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    state, drawn = torch.get_rng_state(), np.random.get_state()[1].copy()
    torch.manual_seed(5)
    plain = StreamingCNN(net, 7, verify=False)(IMAGE.float())
    torch.manual_seed(5)
    checked = StreamingCNN(net, 7)(IMAGE.float())
    assert torch.equal(plain, checked)
    assert all(p.grad is not None and torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(part.training for part in net.modules())
    assert not any(part._forward_hooks for part in net.modules())
    assert np.array_equal(drawn, np.random.get_state()[1])
    assert state.shape == torch.get_rng_state().shape


def test_the_check_runs_once_for_each_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    net, runs = Net(lambda net, x: x.relu()), []
    monkeypatch.setattr("widefield.streaming.verification._VERIFIED", {})
    monkeypatch.setattr("widefield.streaming.verification.verify", lambda *args: runs.append(torch.is_grad_enabled()))
    streamed = StreamingCNN(net, 7)
    streamed(IMAGE), streamed(IMAGE), StreamingCNN(net, 5)(IMAGE[..., :15])
    with torch.no_grad():
        streamed(IMAGE), streamed(IMAGE)
    assert runs == [True, False]
    StreamingCNN(Net(lambda net, x: x.sigmoid()), 7, verify=False)(IMAGE)
    assert len(runs) == 2


def test_dropout_is_compared_under_the_same_masks() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.Dropout2d(0.3), nn.AdaptiveAvgPool2d(1)
    )
    net = nn.Sequential(net, nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 2))
    StreamingCNN(net, 7, unsupported="run_whole")(IMAGE.float())


def test_a_forward_pass_that_is_never_the_same_is_refused() -> None:
    net, seen = Net(lambda net, x: x), (count for count in range(1, 1000))
    net.a.register_forward_hook(lambda module, args, out: out * next(seen))
    with pytest.raises(VerificationError, match="differ from each other"):
        StreamingCNN(net, 7)(IMAGE)


def test_the_check_computes_in_float32_whatever_else_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, compare = [], verification.outcome
    allowed = torch.backends.cudnn.rnn.fp32_precision

    def outcome(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return compare(*args, **kwargs)

    monkeypatch.setattr(verification, "_VERIFIED", {})
    monkeypatch.setattr(verification, "outcome", outcome)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.conv.fp32_precision = (
        "ieee"  # beside "tf32" of recurrent layers, which torch.export does not take
    )
    try:
        StreamingCNN(Net(lambda net, x: net.b(x)), 7)(IMAGE)
        assert torch.get_float32_matmul_precision() == "high"
        assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision) == ("ieee", allowed)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
    assert set(seen) == {"ieee"}


@pytest.mark.slow
def test_a_gate_near_zero_is_no_other_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 one ReLU of this network is open in one pass and shut in the other; in float64 both agree to 5e-15."""
    monkeypatch.setattr(verification, "_VERIFIED", {})
    models = pytest.importorskip("torchvision.models.segmentation")
    torch.manual_seed(0)
    network = models.deeplabv3_resnet50(weights=None, weights_backbone=None).eval()
    StreamingCNN(network, memory_budget="2GiB")(torch.rand(1, 3, 256, 256))
