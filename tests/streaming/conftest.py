"""Tests of the engine compare with plain PyTorch themselves; the check at first use has tests of its own."""

import pytest

from widefield.streaming import StreamingCNN


@pytest.fixture(autouse=True)
def without_the_check_at_first_use(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.stem not in ("test_unseen", "test_mutations", "test_it_streams"):
        monkeypatch.setattr(StreamingCNN, "_verify", lambda *args: None)
