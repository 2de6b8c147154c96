"""Free memory goes back to the system when a budget requires it, and only then."""

import pytest
import torch

from widefield.streaming import heap
from widefield.streaming.heap import Heap, watch


def test_free_memory_is_given_back_above_the_limit() -> None:
    watching = watch(budget=1 << 40, margin=1 << 20)
    if watching is None:
        pytest.skip("the heap of this system can be neither asked nor trimmed")
    blocks = [torch.ones(25_000) for _ in range(1000)]  # 100 kB each, on the heap
    kept = blocks[::2]
    del blocks
    before = heap._resident()
    watching.trim()
    assert heap._resident() > before - (1 << 20), "below the limit nothing is given back"
    tight = Heap(limit=0, margin=1 << 20)
    tight.trim()
    assert heap._resident() < before - (20 << 20)
    assert tight.limit > heap._resident(), "what is in use cannot be given back: the next step must not try again"
    assert all(block.sum() == 25_000 for block in kept)
