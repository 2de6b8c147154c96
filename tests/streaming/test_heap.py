"""Free memory goes back to the system when a budget requires it, and only then."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from widefield.streaming import heap
from widefield.streaming.heap import Heap, watch

pytestmark = pytest.mark.cpu


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
    tight = Heap(budget=0, margin=1 << 20, in_use=1 << 40, limit=0)
    tight.trim()
    assert heap._resident() < before - (20 << 20)
    assert tight.limit > heap._resident(), "what is in use cannot be given back: the next step must not try again"
    assert all(block.sum() == 25_000 for block in kept)


def test_what_was_given_back_before_the_pass_does_not_count() -> None:
    """Free memory that has no pages any more could not be given back a second time."""
    blocks = [torch.ones(25_000) for _ in range(1000)]
    kept, margin, budget = blocks[::2], 1 << 20, 8 << 20
    del blocks
    if heap._glibc() is None:
        pytest.skip("the heap of this system can be neither asked nor trimmed")
    heap._glibc().malloc_trim(0)
    before = heap._resident()
    watching = watch(budget, margin)
    assert watching is not None
    assert watching.limit < before, "some of what is free has no pages, how much is not known"
    watching.trim()
    assert abs(watching.limit - (before + budget - margin)) < 2 << 20
    more = [torch.ones(25_000) for _ in range(40)]  # 4 MB
    watching.trim()
    assert abs(watching.limit - (before + budget - margin)) < 2 << 20
    assert len(kept) + len(more) == 540


@pytest.mark.parametrize(
    ("tunables", "planned", "expected"),
    [("", 600, [(-3, 1 << 20)]), ("glibc.malloc.tcache_count=0", 600, []), ("", 400, [])],
    ids=["a full budget", "in a tuned process", "half a budget"],
)
def test_large_blocks_get_pages_of_their_own_where_a_budget_is_to_be_filled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tunables: str, planned: int, expected: list[tuple[int, int]]
) -> None:
    called: list[tuple[int, int]] = []

    class Library:  # hashable, as a library is
        def mallopt(self, name: int, value: int) -> None:
            called.append((name, value))

        def mallinfo2(self) -> Any:
            return SimpleNamespace(uordblks=0, hblkhd=0, fordblks=0)

    library: Any = Library()
    monkeypatch.setattr(heap, "_glibc", lambda: library)
    monkeypatch.setattr(heap.os, "confstr", lambda name: "glibc 2.36")  # type: ignore[attr-defined]
    (tmp_path / "environ").write_text(f"HOME=/\0GLIBC_TUNABLES={tunables}\0")
    monkeypatch.setattr(heap, "_ENVIRON", tmp_path / "environ")
    heap._caches_remainders.cache_clear()
    for _ in range(2):
        watch(1000, 10, planned)
    heap._caches_remainders.cache_clear()
    assert called == expected
