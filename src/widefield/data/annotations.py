"""Image files that a text file names."""

from pathlib import Path
from typing import Annotated

from widefield.components.transforms.masks import MaskGeneratorConfig
from widefield.data.described import DescribedDataset
from widefield.data.labels import LabelError
from widefield.data.pipeline import Picture, TransformsConfig
from widefield.images import Alpha, open_image
from widefield.registry import DATASETS, Range


@DATASETS.register_module()
class AnnotationFile(DescribedDataset):
    """Image files that a text file names, with their labels.

    A line is a path from `root`, which may hold spaces, and after a space the index of the class: `dogs/rex.png 3`. Empty lines and
    those that begin with # count for nothing.

    Attributes:
        label_count: The largest label, plus 1.

    Args:
        root: The folder of the images.
        ann_file: The text file (UTF-8), by its path from `root` or as it is.
        class_names: Names of the classes; None where they have none.
        multi_label: A line has any number of classes, separated by commas: `rex.png 0,3`; an image of none ends in a dash.
        level: Level of pyramids, 0 the largest.
        transforms: See `Pipeline`.
        mask_generator: Gives each sample a random `mask`.
        alpha: "keep" takes a last channel that is marked as alpha like every other, see `open_image`.

    Raises:
        FileNotFoundError: The text file, or an image, is not there.
        LabelError: A line without a label, or with one that there is no class for; there are no lines.
    """

    def __init__(
        self,
        root: Path,
        ann_file: Path,
        class_names: list[str] | None = None,
        multi_label: bool = False,
        level: Annotated[int, Range(0)] = 0,
        transforms: TransformsConfig = None,
        mask_generator: MaskGeneratorConfig = None,
        alpha: Alpha = "drop",
    ) -> None:
        super().__init__(transforms, mask_generator)
        root, ann_file = Path(root), Path(ann_file)
        place = root / ann_file if (root / ann_file).is_file() else ann_file
        if not place.is_file():
            raise FileNotFoundError(f"the annotation file {ann_file} does not exist, neither as it is nor in {root}")
        self.class_names = class_names
        self.multi_label = multi_label
        self.level = level
        self.alpha: Alpha = alpha
        lines = enumerate(place.read_text(encoding="utf-8-sig").splitlines(), start=1)
        rows = [
            (root / path, labels)
            for number, line in lines
            if line.strip() and not line.startswith("#")
            for path, labels in [self._parse(line.strip(), f"{place}, line {number}")]
        ]
        if not rows:
            raise LabelError(f"{place} names no image; write a line for each, such as images/1.png 0")
        missing = [path for path, _ in rows if not path.is_file()]
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise FileNotFoundError(
                f"{place} names {missing[0]}{more}, which does not exist; paths start from root={root}"
            )
        self._rows = rows
        self.label_count = max((label for _, labels in rows for label in labels), default=-1) + 1

    def __len__(self) -> int:
        return len(self._rows)

    def picture(self, index: int) -> Picture:
        return open_image(self._rows[index][0], self.level, alpha=self.alpha)

    def label(self, index: int) -> int | list[int]:
        labels = self._rows[index][1]
        return labels if self.multi_label else labels[0]

    def _parse(self, line: str, where: str) -> tuple[str, list[int]]:
        path, _, text = line.rpartition(" ")
        texts = [] if self.multi_label and text == "-" else text.split(",")
        if not path or not all(one.isdecimal() for one in texts):
            raise LabelError(
                f"{where}: {line!r} does not end in the index of a class; write a path, a space, and 0, say"
            )
        labels = [int(one) for one in texts]
        if len(labels) > 1 and not self.multi_label:
            raise LabelError(f"{where}: there are {len(labels)} labels; several per image need multi_label=true")
        if self.class_names is not None and max(labels, default=0) >= len(self.class_names):
            raise LabelError(
                f"{where}: the label {max(labels)} is beyond the {len(self.class_names)} class names, from 0"
            )
        return path.strip(), labels
