"""Image files in folders, one for each class."""

import logging
from pathlib import Path
from typing import Annotated

from widefield.components.transforms.masks import MaskGeneratorConfig
from widefield.data.described import DescribedDataset
from widefield.data.labels import LabelError
from widefield.data.pipeline import Picture, TransformsConfig
from widefield.images import IMAGE_ENDINGS, Alpha, images_below, open_image
from widefield.registry import DATASETS, Range

_log = logging.getLogger(__name__)


@DATASETS.register_module()
class ImageFolder(DescribedDataset):
    """Image files of a folder, with a class for each of its sub-folders.

    Sub-folders are sorted by name; their files, however deep, too. Links are followed; hidden files and folders count for nothing.

    Args:
        root: The folder.
        with_label: False takes all files of the folder, however deep, without classes.
        level: Level of pyramids, 0 the largest.
        extensions: How the names of image files end.
        transforms: See `Pipeline`.
        mask_generator: Gives each sample a random `mask`.
        alpha: "keep" takes a last channel that is marked as alpha like every other, see `open_image`.

    Raises:
        FileNotFoundError: There is no such folder.
        LabelError: It has no sub-folders, or no images.
    """

    def __init__(
        self,
        root: Path,
        with_label: bool = True,
        level: Annotated[int, Range(0)] = 0,
        extensions: tuple[str, ...] = IMAGE_ENDINGS,
        transforms: TransformsConfig = None,
        mask_generator: MaskGeneratorConfig = None,
        alpha: Alpha = "drop",
    ) -> None:
        super().__init__(transforms, mask_generator)
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"the folder of images {root} does not exist")
        self.level = level
        self.alpha: Alpha = alpha
        self._labels: list[int] | None = None
        if not with_label:
            self.files = images_below(root, extensions)
        else:
            folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
            if not folders:
                raise LabelError(
                    f"{root} has no sub-folders, one for each class; without classes give with_label=false"
                )
            self.class_names = [folder.name for folder in folders]
            files = [images_below(folder, extensions) for folder in folders]
            self.files = [file for inside in files for file in inside]
            self._labels = [label for label, inside in enumerate(files) for _ in inside]
            empty = [folder.name for folder, inside in zip(folders, files, strict=True) if not inside]
            if empty and self.files:
                _log.warning("%s has no images of %s", root, ", ".join(empty))
        if not self.files:
            raise LabelError(f"{root} holds no images; those end in {', '.join(extensions)}")

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, index: int) -> Picture:
        return open_image(self.files[index], self.level, alpha=self.alpha)

    def label(self, index: int) -> int | None:
        return None if self._labels is None else self._labels[index]
