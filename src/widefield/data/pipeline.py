"""From an image as it is stored to what a model is given."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, get_args

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.tv_tensors import Image

from widefield.config import checked
from widefield.config.check import member
from widefield.errors import WrongArgumentError
from widefield.images import ImageFile
from widefield.registry import TRANSFORMS, ComponentOf, Range, arguments_of, split_description

Transform = Callable[[Any], Any]
TransformsConfig = Annotated[list[dict[str, Any]] | None, ComponentOf(TRANSFORMS)]
Picture = Tensor | ImageFile
"""A tensor (C, H, W), or an image that is read lazily."""


class Pipeline:
    """Transforms, one after the other.

    A lazily read image is read whole before the first transform of torchvision; without any transform it stays lazy. Where a
    transform gives several pictures, in a tuple, those after it change each of them.

    Attributes:
        description: What was given.

    Args:
        transforms: Descriptions such as `{type: RandomCrop, size: 32}`; an interpolation is a text, such as `bicubic`.
    """

    def __init__(self, transforms: TransformsConfig = None) -> None:
        self.description = list(transforms or ())
        self._transforms = [_build(one) for one in self.description]

    def __call__(self, picture: Any) -> Any:
        """A picture, or a tuple of them, transformed; plain tensors keep their type (8 bits stay 8 bits).

        Raises:
            WrongArgumentError: A transform of the user takes or returns something else, such as a dictionary.
        """
        for transform in self._transforms:
            picture = (
                tuple(_changed(one, transform) for one in picture)
                if isinstance(picture, tuple)
                else _changed(picture, transform)
            )
        return tuple(map(_plain, picture)) if isinstance(picture, tuple) else _plain(picture)


@TRANSFORMS.register_module()
class MultiView:
    """Several random views of an image, of one kind or of several.

    Args:
        transforms: What makes a view; or a list of several lists, each of which makes views of its own.
        num_views: How many views there are; of several kinds a list of how many of each.
    """

    @checked
    def __init__(
        self, transforms: TransformsConfig | list[TransformsConfig], num_views: Annotated[int, Range(1)] | list[int] = 2
    ) -> None:
        kinds: list[Any] = [transforms] if not transforms or isinstance(transforms[0], dict) else transforms
        counts = [num_views] * len(kinds) if isinstance(num_views, int) else list(num_views)
        if len(counts) != len(kinds) or min(counts) < 1:
            raise ValueError(
                f"num_views={num_views} must be positive, and one number for each of {len(kinds)} kinds of views"
            )
        self._views = [view for kind, count in zip(kinds, counts) for view in [Pipeline(kind)] * count]

    def __call__(self, picture: Picture) -> tuple[Any, ...]:
        """The views."""
        picture = whole(picture)
        return tuple(view(picture) for view in self._views)


@TRANSFORMS.register_module()
class RandomApply:
    """Several transforms, all of them or none.

    Args:
        transforms: One after the other.
        p: Probability of them.
    """

    @checked
    def __init__(self, transforms: TransformsConfig, p: Annotated[float, Range(0, 1)] = 0.5) -> None:
        self.p = p
        self._pipeline = Pipeline(transforms)

    def __call__(self, picture: Picture) -> Any:
        """The picture, changed or as it is."""
        return self._pipeline(picture) if torch.rand(()).item() < self.p else picture


@dataclass(frozen=True)
class _OfTorchvision:
    """A transform of whole images."""

    transform: v2.Transform

    def __call__(self, picture: Picture) -> Any:
        return self.transform(Image(whole(picture)))


def whole(picture: Picture) -> Tensor:
    """All pixels of a picture as a tensor (C, H, W) of their type."""
    return picture if isinstance(picture, Tensor) else torch.as_tensor(picture.read(0, 0, *picture.shape[1:]))


def torchvision_transform(description: dict[str, Any]) -> v2.Transform:
    """Return the transform of torchvision that is described.

    Raises:
        WrongArgumentError: It is another.
    """
    made = _build(description)
    if not isinstance(made, _OfTorchvision):
        raise WrongArgumentError(
            f"{type(made).__name__} changes images alone; give transforms of torchvision, such as "
            "{type: RandomAffine, degrees: 20}"
        )
    return made.transform


def _build(description: dict[str, Any]) -> Transform:
    name, arguments = split_description(description)
    kind = TRANSFORMS.get(name) if isinstance(name, str) else name
    if isinstance(kind, type) and issubclass(kind, v2.Transform):
        arguments = {key: _enumerated(value, key, kind) for key, value in arguments.items()}
        size = arguments.get("size")
        if any(isinstance(side, int) and side < 1 for side in (size if isinstance(size, list) else [size])):
            raise ValueError(f"size={size} must be positive")  # torchvision finds that out at the first image
    transform: Transform = TRANSFORMS.build({"type": name, **arguments})
    return _OfTorchvision(transform) if isinstance(transform, v2.Transform) else transform


def _enumerated(value: Any, name: str, kind: Callable[..., Any]) -> Any:
    """The member of torchvision's enumerations that a text means."""
    known = arguments_of(kind).named.get(name)
    kinds = () if known is None else (known.annotation, *get_args(known.annotation))
    found = (member(one, value) for one in kinds if isinstance(one, type) and issubclass(one, Enum))
    return next((one for one in found if one is not None), value)


def _changed(picture: Any, transform: Transform) -> Any:
    if isinstance(transform, _OfTorchvision):
        return transform(picture)
    kind = type(picture).__name__
    try:
        result = transform(picture)
        if result is not None and not isinstance(result, dict):
            return result
        what = f"returned {'nothing' if result is None else 'a dictionary'}"
        cause = None
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        what, cause = f"failed with {type(error).__name__}: {error}", error
    raise WrongArgumentError(
        f"the transform {type(transform).__name__} was given a picture ({kind}) and {what}; a transform gets a picture, which is a "
        "tensor (C, H, W) or a lazily read image, and returns one, not a dictionary of results"
    ) from cause


def _plain(picture: Any) -> Any:
    return picture.as_subclass(Tensor) if isinstance(picture, Image) else picture
