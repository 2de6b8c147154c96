"""The seeded split of images into those to train on and those for validation."""

from collections.abc import Hashable, Sequence

import numpy as np

from widefield.config import checked


@checked
def stratified_split(
    labels: Sequence[int] | np.ndarray, fraction: float, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[list[int], list[int]]:
    """Split images so that both sides have about the same share of each class, and no group is on both.

    `fraction` of the images of each class, rounded, is to go to validation. Groups come by falling size, those of one size by
    chance, and a group goes there if that brings the numbers of images, as shares of what is wanted, nearer to that. If a class of
    two groups or more is then without an image on that side, the group of it that leaves the numbers the nearest goes there, too.
    No class loses its last image for training. Each image is a group of its own if there are no groups, so that numbers are met.

    scikit-learn's StratifiedGroupKFold makes folds of equal size, which gives fractions of 1/2, 1/3, ... alone.

    Args:
        labels: The class of each image, or (N, C) with 1 for each of the classes that it has, and 0.
        fraction: The share of validation, at least 0 and below 1.
        seed: The same arguments give the same split.
        groups: Whose image each is, such as the patient.

    Returns:
        Indices of images for training and for validation, each in ascending order.

    Raises:
        ValueError: `fraction` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the validation fraction is {fraction}; it must be at least 0 and below 1")
    if not len(labels):
        return [], []
    counts = _one_hot(np.asarray(labels))
    members = _members(counts, groups, np.random.default_rng(seed))
    sizes = np.stack([counts[indices].sum(0) for indices in members])
    total = counts.sum(0)
    wanted = np.round(fraction * total)
    several = (sizes > 0).sum(0) > 1
    if fraction:
        wanted = np.where(several, np.clip(wanted, 1, total - 1), np.minimum(wanted, total - 1))
    held, unit = np.zeros_like(wanted), np.maximum(wanted, 1)
    chosen: set[int] = set()

    def distance(group: int) -> float:
        """Return how far from what is wanted the numbers are with this group; infinite if training lost a class by it."""
        loses = (held + sizes[group] == total) & (sizes[group] > 0)
        return np.inf if loses.any() else float((np.abs(held + sizes[group] - wanted) / unit).sum())

    def choose(group: int) -> None:
        nonlocal held
        held = held + sizes[group]
        chosen.add(group)

    for group in range(len(members)):
        if distance(group) < (np.abs(held - wanted) / unit).sum():
            choose(group)
    for label in np.flatnonzero(several & (wanted > 0)):
        rest = [group for group in range(len(members)) if sizes[group, label] and group not in chosen]
        if not held[label] and np.isfinite(distance(best := min(rest, key=distance))):
            choose(best)
    validation = {int(index) for group in chosen for index in members[group]}
    return [index for index in range(len(counts)) if index not in validation], sorted(validation)


def _one_hot(labels: np.ndarray) -> np.ndarray:
    """Return 1 for each class of each image; of labels (N, C) the rarest class first, which is the hardest to place.

    These get a last column of ones, so that images without a class count.
    """
    if labels.ndim == 2:
        rarest_first = labels[:, np.argsort(labels.sum(0), kind="stable")].astype(np.int64)
        return np.concatenate([rarest_first, np.ones((len(labels), 1), np.int64)], axis=1)
    return (labels[:, None] == np.unique(labels)).astype(np.int64)


def _members(counts: np.ndarray, groups: Sequence[Hashable] | None, generator: np.random.Generator) -> list[np.ndarray]:
    """Return the indices of the images of each group, the largest group first, and those of one size in a drawn order."""
    # drawn class by class, as splits without groups always were: the same seed gives the same split
    first = counts.argmax(1)
    order = [index for label in np.unique(first) for index in generator.permutation(np.flatnonzero(first == label))]
    by_group: dict[Hashable, list[int]] = {}
    for index in order:
        by_group.setdefault(index if groups is None else groups[index], []).append(int(index))
    return [np.array(one) for one in sorted(by_group.values(), key=len, reverse=True)]
