"""Pretraining makes a network see what it did not see before."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pretraining_quality.py"


@pytest.mark.slow
def test_byol_tells_photographs_apart_better_than_the_untrained_network() -> None:
    spec = importlib.util.spec_from_file_location("pretraining_quality", SCRIPT)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        row = benchmark.measure("byol", seed=0, epochs=4)
    finally:
        torch.set_num_threads(threads)
    assert row["before"] < 0.4, "an easy task would say nothing"
    assert row["after"] > row["before"] + 0.05
