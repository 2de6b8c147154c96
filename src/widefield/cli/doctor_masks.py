"""Label maps for `widefield doctor --masks`: each is read once, and a line says what does not go with its image or the classes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from widefield.data.paired_images import PairedImage, matched
from widefield.data.segmented_images import label_strips
from widefield.data.tables import listed
from widefield.images import open_image, open_labels
from widefield.images.foreground import is_geojson, named_polygons

IGNORED = 255
"""The label that counts neither in the loss nor in scores, unless a run says otherwise."""


@dataclass
class MaskFinding:
    """The contents of a label map.

    Attributes:
        path: The file.
        counts: Pixels of each label.
        problem: What is wrong with it; "" if nothing is.
    """

    path: Path
    counts: Counter[int] = field(default_factory=Counter)
    problem: str = ""

    @property
    def shares(self) -> str:
        """The share of each label, as "0: 0.93; 1: 0.07"."""
        total = sum(self.counts.values())
        return "; ".join(f"{label}: {count / total:.3g}" for label, count in sorted(self.counts.items()))


def examine_masks(
    images: Path, masks: Path, classes: Sequence[str] | None
) -> tuple[dict[Path, MaskFinding], list[str]]:
    """Read the label maps of a folder of images.

    Args:
        images: Folder of the images.
        masks: Folder of their label maps.
        classes: Names of the labels from 0; None where they are not known.

    Returns:
        What was found, by image, and a line for each thing that is wrong with the folders or with several label maps.
    """
    try:
        pairs = matched(images, masks)
    except ValueError as error:
        return {}, [str(error)]
    found = {pair.path: examine_mask(pair, classes) for pair in pairs}
    read = [one for one in found.values() if one.counts]
    problems = [f"{one.path}: {one.problem}" for one in found.values() if one.problem]
    every = sum((one.counts for one in read), Counter[int]())
    if set(every) == {0, IGNORED}:
        problems.append(
            f"the label maps hold 0 and {IGNORED} alone, and {IGNORED} counts neither in the loss nor in scores; write the second "
            "class as 1, or give another data.ignore_index"
        )
    return found, problems


def examine_mask(pair: PairedImage, classes: Sequence[str] | None) -> MaskFinding:
    """Read a label map once."""
    finding = MaskFinding(pair.label)
    try:
        names = classes
        if classes is None and is_geojson(pair.label):
            names = ["background", *sorted({str(name) for name, _ in named_polygons(pair.label)} - {"background"})]
        labels = open_labels(pair.label, open_image(pair.path), names)
        for _, strip in label_strips(labels):
            finding.counts.update(
                dict(zip(*(part.tolist() for part in np.unique(strip, return_counts=True)), strict=True))
            )
    except (OSError, ValueError) as error:
        finding.counts.clear()
        finding.problem = str(error)
        return finding
    odd = sorted(
        label
        for label in finding.counts
        if label < 0 or (classes is not None and label >= len(classes) and label != IGNORED)
    )
    if odd:
        expected = "whole numbers from 0" if classes is None else f"the {len(classes)} classes from 0, or {IGNORED}"
        finding.problem = f"it has the labels {listed(list(map(str, odd)))}, expected {expected}"
    elif set(finding.counts) == {IGNORED}:
        finding.problem = f"all of its pixels are {IGNORED}, which does not count"
    return finding


def summary(found: dict[Path, MaskFinding], classes: Sequence[str] | None) -> list[str]:
    """Return lines that tell of the label maps that could be read: the share of each label, and those with one label alone."""
    read = [one for one in found.values() if one.counts]
    if not read:
        return []
    every = MaskFinding(Path(), sum((one.counts for one in read), Counter[int]()))
    lines = [f"{len(read)} label maps; shares of the labels: {every.shares}"]
    missing = [name for label, name in enumerate(classes or ()) if label not in every.counts]
    if missing:
        lines.append(f"classes that no label map has: {listed(missing)}")
    blank = [str(one.path) for one in read if set(one.counts) <= {0, IGNORED} and 0 in one.counts]
    if blank and len(every.counts) > 1:
        lines.append(f"{len(blank)} label maps without a class but the first: {listed(blank)}")
    return lines
