"""The validation split."""

import pytest

from widefield.data import stratified_split


def test_each_class_gives_its_share() -> None:
    labels = [0] * 20 + [1] * 10
    train, val = stratified_split(labels, 0.2, seed=0)
    assert sorted([*train, *val]) == list(range(30))
    assert [labels[index] for index in val].count(0) == 4
    assert [labels[index] for index in val].count(1) == 2


def test_the_seed_decides() -> None:
    labels = [0, 1] * 20
    assert stratified_split(labels, 0.3, seed=1) == stratified_split(labels, 0.3, seed=1)
    assert stratified_split(labels, 0.3, seed=1) != stratified_split(labels, 0.3, seed=2)


def test_small_classes_keep_an_image_on_each_side() -> None:
    train, val = stratified_split([0, 0, 1], 0.01, seed=0)
    assert len(val) == 1
    assert val[0] in (0, 1)
    assert 2 in train


def test_a_fraction_of_zero_leaves_nothing_for_validation() -> None:
    assert stratified_split([0, 1], 0.0, seed=0) == ([0, 1], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="validation fraction"):
        stratified_split([0, 1], fraction, seed=0)
