"""Features of images, whether the backbone computes them whole or tile by tile."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widefield.errors import WrongArgumentError
from widefield.images import Background
from widefield.streaming import StreamingCNN, UnsupportedOpError
from widefield.streaming.foreground import Foreground


def streams(backbone: nn.Module) -> bool:
    """True if a backbone computes its maps tile by tile."""
    return getattr(backbone, "streamed", None) is not None


def background_of(image: Any) -> Background | None:
    """Return what is left out of an image; None if nothing is."""
    found: Background | None = getattr(image, "background", None)
    return found


def left_out(background: Background | None) -> dict[str, Any]:
    """Return the arguments of `StreamingCNN` that leave a background out."""
    return {} if background is None else {"mask": background.mask, "fill": background.fill}


def foreground_of_map(background: Background, size: Sequence[int]) -> Tensor:
    """Return which positions of a map (..., height, width) of an image the engine takes for foreground: bool (height, width)."""
    height, width = size[-2:]
    cells = Foreground(torch.from_numpy(background.mask.cells)[None])
    return cells.tile((height, width), 0, 0, height, width, torch.device("cpu"))[0]


def mask_of_map(background: Background | None, fmap: Tensor) -> Tensor | None:
    """Return the mask (1, h, w) of a map (1, C, h, w) of an image, as `InstancePooling` takes it; None without a background."""
    return None if background is None else foreground_of_map(background, fmap.shape)[None].to(fmap.device)


class OverForeground:
    """The part behind a trunk, such as pooling and a classifier, applied to the foreground of the trunk's map alone.

    Args:
        part: The module; its parameters stay its own.
        trunk: What gave the maps; memory and determinism are as there.
    """

    def __init__(self, part: nn.Module, trunk: StreamingCNN) -> None:
        self.part = part
        self._network = StreamingCNN(
            part,
            memory_budget=trunk.memory_budget,
            batch_statistics="exact",  # as the part itself has them
            deterministic=trunk.deterministic,
            unsupported="run_whole",
            verify=trunk.verify,
        )

    def __call__(self, fmap: Tensor, background: Background) -> Any:
        """Return what the part gives for a map (1, C, height, width), zero in the background.

        Raises:
            ValueError: An operation needs the whole map, which has no meaning for a part of it.
        """
        try:
            return self._network(fmap, mask=foreground_of_map(background, fmap.shape))
        except UnsupportedOpError as error:
            what = f"{error.op} in layer '{error.module_path}' {error.reason}"
            raise WrongArgumentError(f"a mask needs a network that is streamed as a whole: {what}") from error


def backbone_features(backbone: nn.Module, images: Any, preprocessor: nn.Module) -> Any:
    """Return what the backbone gives for images (N, C, H, W), for a lazily read image, or, in a list, for each of several.

    A tensor is taken as it is. Lazily read images are normalised as the data preprocessor says, tile by tile.

    Raises:
        WrongArgumentError: Lazily read images for a backbone that does not stream, or a data preprocessor without a normalisation.
    """
    network: Any = getattr(backbone, "streamed", None)
    if network is None and isinstance(images, (list, tuple)) and hasattr(images[0], "read"):
        raise WrongArgumentError(
            f"{type(backbone).__name__} does not stream, so it takes no lazily read images; give a tensor (N, C, H, W), or "
            "streaming={} to a backbone of convolutions"
        )
    if network is None or isinstance(images, Tensor):
        return backbone(images)
    normalisation = getattr(preprocessor, "normalisation", None)
    if normalisation is None:
        raise WrongArgumentError(
            f"{type(preprocessor).__name__} has no normalisation, which a streamed backbone needs for its tiles; inherit from "
            "BaseDataPreprocessor"
        )
    before = network.normalisation
    network.normalisation = normalisation  # what is recorded for the backward pass keeps it
    try:
        if not isinstance(images, (list, tuple)):
            return backbone(images, **left_out(background_of(images)))
        if any(background_of(image) is not None for image in images):
            return [backbone(image, **left_out(background_of(image))) for image in images]
        return backbone(images)
    finally:
        network.normalisation = before


def neck_features(neck: nn.Module | None, features: Any, of_list: bool) -> Any:
    """Return what the neck gives for features of the backbone, as one batch.

    Maps of one size are one batch to the neck. Otherwise it gets those of one image after the other.

    Args:
        neck: None for none.
        features: Those of a batch, or `of_list` those of each image, in a list.
        of_list: Which of these.

    Raises:
        WrongArgumentError: The results for different images differ in size.
    """
    if not of_list:
        return features if neck is None else neck(features)
    if len({_shapes(one) for one in features}) == 1:
        return neck_features(neck, _joined(features), False)
    pooled = features if neck is None else [neck(one) for one in features]
    if len({_shapes(one) for one in pooled}) > 1:
        raise WrongArgumentError(
            "images of different sizes have maps of different sizes, which make no batch; give a neck that pools, such as "
            "{type: GlobalAveragePooling}, or data.batch_size=1"
        )
    return _joined(pooled)


def _shapes(features: Any) -> tuple[torch.Size, ...]:
    return tuple(one.shape for one in ([features] if isinstance(features, Tensor) else features))


def _joined(features: Sequence[Any]) -> Any:
    if isinstance(features[0], Tensor):
        return torch.cat(list(features))
    return tuple(torch.cat(level) for level in zip(*features, strict=True))
