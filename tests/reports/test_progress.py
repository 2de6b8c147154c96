"""The line about a long command."""

import io
import logging
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from widefield.reports import ProgressLine, progress
from widefield.streaming import StreamingCNN


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_line_tells_image_tile_memory_and_the_time_that_is_left(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = [100 * 2**20]
    monkeypatch.setattr(progress, "memory_in_use", lambda device: used[0])
    network = StreamingCNN(nn.Conv2d(1, 1, 1), memory_budget="2GiB")
    with ProgressLine(network, console=Console(file=io.StringIO())) as line:
        line.update(0, 4, "epoch 1 of 2", share=0.0)
        clock[0] += 600
        used[0] += 200 * 2**20
        line.update(1, 4, "epoch 1 of 2", "loss 0.5", share=0.125)
        assert network.progress is not None
        network.progress("backward", 3, 9)
        told = "epoch 1 of 2 · image 2 of 4 · backward, tile 3 of 9 · 200 MiB of 2.00 GiB · 1:10 h left · loss 0.5"
        assert line.text() == told
    assert network.progress is None


def test_elsewhere_than_at_a_terminal_the_log_has_a_line_a_minute_at_most(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="widefield")
    drawn = io.StringIO()
    with ProgressLine(console=Console(file=drawn)) as line:
        for k in range(13):
            line.update(k, 13)
            clock[0] += 10
    assert drawn.getvalue() == ""
    assert [record.message for record in caplog.records] == [
        "image 7 of 13 · 0:02 h left",
        "image 13 of 13 · 10 s left",
    ]


def test_at_a_terminal_one_line_is_drawn_and_taken_away() -> None:
    drawn = io.StringIO()
    network = StreamingCNN(nn.Conv2d(1, 2, 3, padding=1), tile_size=8)
    with ProgressLine(network, "slide", Console(file=drawn, force_terminal=True, width=200)) as line, torch.no_grad():
        line.update(0, 2)
        network(torch.rand(1, 1, 16, 16))
        line._live.refresh()
    assert "slide 1 of 2 · forward, tile" in drawn.getvalue()
    assert "\n\n" not in drawn.getvalue()


def test_an_error_ends_the_line(clock: list[float]) -> None:
    network: Any = StreamingCNN(nn.Conv2d(1, 1, 1))
    with pytest.raises(KeyError), ProgressLine(network, console=Console(file=io.StringIO())):
        raise KeyError
    assert network.progress is None
