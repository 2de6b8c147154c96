"""Results are compared piece by piece, with the number that a comparison of all at once gives."""

import pytest
import torch

from widefield.streaming import comparison
from widefield.streaming.comparison import relative_error


@pytest.mark.parametrize("order", [2, torch.inf])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pieces_give_the_error_of_the_whole(
    order: float, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_PIECE", 7)
    expected = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    found = (expected + 0.01 * torch.rand_like(expected)).contiguous(memory_format=layout)
    norm = torch.linalg.vector_norm
    error = norm((found - expected).flatten(), order) / norm(expected.flatten(), order)
    assert relative_error(found, expected, order) == pytest.approx(error.item(), rel=1e-12)
    assert relative_error(found, expected, order, floor=1e3) == pytest.approx(
        error.item() * norm(expected.flatten(), order).item() / 1e3, rel=1e-12
    )


def test_numbers_that_are_not_finite_must_be_so_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "_PIECE", 2)
    one, other = torch.tensor([1.0, 2.0, torch.nan, torch.inf]), torch.tensor([1.0, 2.0, torch.nan, torch.inf])
    assert relative_error(one, other) == 0
    other[3] = 1.0
    assert relative_error(one, other) == torch.inf
    assert relative_error(torch.empty(0), torch.empty(0)) == 0
