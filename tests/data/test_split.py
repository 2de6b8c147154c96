"""The validation split."""

import numpy as np
import pytest

from widefield.data import stratified_split


def test_each_class_gives_its_share() -> None:
    labels = [0] * 20 + [1] * 10
    train, val = stratified_split(labels, 0.2, seed=0)
    assert sorted([*train, *val]) == list(range(30))
    assert [labels[index] for index in val].count(0) == 4
    assert [labels[index] for index in val].count(1) == 2


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_together_and_classes_are_balanced(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    groups = [f"{label}-{generator.integers(0, 20)}" for label in labels]
    train, val = stratified_split(labels, 0.2, seed, groups)
    assert sorted([*train, *val]) == list(range(100))
    assert not {groups[index] for index in train} & {groups[index] for index in val}
    counts = np.bincount(labels[val], minlength=3)
    assert np.abs(counts - [12, 6, 2]).max() <= 3
    assert counts.min() >= 1


def test_groups_that_are_too_large_to_fit_still_give_a_validation_set() -> None:
    labels = [0, 1] * 10
    train, val = stratified_split(labels, 0.05, 0, ["p"] * 12 + ["q"] * 8)
    assert val == list(range(12, 20))
    train, val = stratified_split(labels, 0.2, 0, ["p"] * 20)
    assert (len(train), val) == (20, [])
    train, val = stratified_split([0, 0, 0, 1, 1], 0.5, 0, ["p", "p", "q", "r", "r"])
    assert {3, 4} <= set(train)


def test_images_of_several_classes_or_none_are_split() -> None:
    labels = np.random.default_rng(0).random((100, 3)) < [0.5, 0.2, 0.05]
    _, val = stratified_split(labels, 0.2, seed=0)
    assert len(val) == 20
    assert np.abs(labels[val].sum(0) - 0.2 * labels.sum(0)).max() < 2


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
