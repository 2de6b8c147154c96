"""The predicted time of a pass: what is counted, and by which rates."""

import pytest
import torch
from torch import nn

from widefield import stream
from widefield.streaming.time_model import RATES, Amounts, relative_time


def test_times_are_sums_over_rates() -> None:
    streamed, plain = Amounts(4e9, 2e6, held=1e6, weights=1e5, filed=3e6, calls=100), Amounts(3e9, elements_whole=5e6)
    assert relative_time(streamed, plain, "cuda") == pytest.approx((4e9 + 2e6 * 32) / (3e9 + 5e6 * 32))
    more = relative_time(streamed, plain, "cpu")
    for kind in ("multiplications", "elements", "held", "weights", "filed", "calls"):
        assert relative_time(Amounts(**{**vars(streamed), kind: 2 * getattr(streamed, kind)}), plain, "cpu") > more


def test_what_is_computed_alone_takes_four_thirds_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RATES, "cpu", RATES["cuda"])
    module = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
    for mib, least in ((24, 1.2), (40, 1.0), (500, 1.0)):
        plan = stream(module, memory_budget=f"{mib}MiB", verify=False).plan((3, 512, 512))
        assert least <= plan.predicted_overhead <= 4 / 3 + 1e-9
    assert plan.predicted_overhead == 1.0


@pytest.mark.cpu
def test_short_steps_are_predicted_to_take_longer() -> None:
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
    module = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *layers)
    streamed = [stream(module, tile, verify=False) for tile in (128, 64, 32)]
    predicted = [each.plan((3, 512, 512)).predicted_overhead for each in streamed]
    assert predicted == sorted(predicted)
    with torch.no_grad():
        assert streamed[-1].plan((3, 512, 512)).predicted_overhead < predicted[-1]


def test_a_pass_in_one_step_takes_as_long_as_a_plain_one() -> None:
    streamed = stream(nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3)), 600, verify=False)
    with torch.no_grad():
        assert streamed.plan((3, 512, 512)).predicted_overhead == pytest.approx(1, abs=0.02)
