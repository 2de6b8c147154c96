"""The validation split: seeded, and stratified by class."""

from collections.abc import Sequence

import numpy as np


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of `labels` for training and for validation, each in ascending order.

    Of each class, `fraction` of its images (rounded, at least one of each side where the class has two or more) go to
    validation. The same labels, fraction and seed give the same split.

    Raises:
        ValueError: `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the validation fraction is {fraction}; it must be at least 0 and below 1")
    if fraction == 0:
        return list(range(len(labels))), []
    generator = np.random.default_rng(seed)
    validation: list[int] = []
    for label in sorted(set(labels)):
        members = np.flatnonzero(np.asarray(labels) == label)
        count = round(fraction * len(members))
        if len(members) > 1:
            count = min(max(count, 1), len(members) - 1)
        validation.extend(generator.permutation(members)[:count].tolist())
    chosen = set(validation)
    return [index for index in range(len(labels)) if index not in chosen], sorted(chosen)
