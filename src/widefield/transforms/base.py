"""The base classes of transforms: data by name in, data by name out, a change drawn at random between."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
import pyvips
import torch

from widefield.transforms.values import Mark, Within, interval

KINDS = {"image": "image", "mask": "mask", "masks": "masks"}
"""The names of data that are transformed, and how."""

Data = dict[str, Any]
ImageFunction = Callable[[pyvips.Image], Any]


@dataclass(frozen=True)
class Change:
    """The change that a transform has drawn for one call.

    Attributes:
        image: Applied to images.
        mask: Applied to masks; None leaves them.
    """

    image: ImageFunction
    mask: ImageFunction | None = None

    def apply(self, data: Data, kinds: Mapping[str, str]) -> Data:
        """`data` changed; what is of no known kind, or None, stays."""
        return {name: self._apply_one(kinds.get(name), value) for name, value in data.items()}

    def _apply_one(self, kind: str | None, value: Any) -> Any:
        if kind is None or value is None:
            return value
        if kind == "image":
            return self.image(value)
        if self.mask is None:
            return value
        return [self.mask(mask) for mask in value] if kind == "masks" else self.mask(value)


def both(function: ImageFunction) -> Change:
    """The same for images and masks."""
    return Change(function, function)


class Step(ABC):
    """A transform or a group of them."""

    p: float

    def __post_init__(self) -> None:
        if not isinstance(self.p, int | float) or not 0 <= self.p <= 1:
            raise ValueError(f"p={self.p!r} of {type(self).__name__}; expected a probability from 0 to 1")

    def __call__(self, *args: Any, force_apply: bool = False, **data: Any) -> Data:
        """Transform what is given by name.

        Args:
            force_apply: Apply it whatever `p` is.
            data: `image`, a pyvips image; `mask`, a pyvips image of its size; `masks`, a list of them. Other entries, such as a
                label, come back as they are.

        Returns:
            The same entries, transformed.

        Raises:
            TypeError: Positional data, or an image or mask that is no pyvips image.
            ValueError: No image, bounding boxes or keypoints, or an image that this transform cannot take.
        """
        if args:
            name = type(self).__name__
            raise TypeError(f"{name} takes its data by name: write transform(image=image), not transform(image)")
        return self.run(data, KINDS, force_apply)

    @abstractmethod
    def run(self, data: Data, kinds: Mapping[str, str], force: bool) -> Data:
        """`__call__` with the kinds of the data by name."""


if TYPE_CHECKING:  # type checkers see the fields that __init_subclass__ adds as arguments that are given by name

    @dataclass(frozen=True, kw_only=True)
    class _Applied(Step):
        always_apply: bool = False
        p: float = 0.5

else:
    _Applied = Step


class Transform(_Applied):
    """A transform that draws its parameters anew at each call; subclasses are frozen dataclasses.

    Each has two more arguments, behind its own.

    Args:
        always_apply: Apply it whatever `p` is.
        p: Probability that it is applied.
    """

    def __init_subclass__(cls, **defaults: Any) -> None:
        """Add both as the last fields, with these defaults, or else those of the class above."""
        cls.__annotations__ = {**vars(cls).get("__annotations__", {}), "always_apply": bool, "p": float}
        for name, value in (("always_apply", False), ("p", 0.5)):
            setattr(cls, name, defaults.get(name, getattr(cls, name, value)))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, mark in _marks(type(self)).items():
            object.__setattr__(self, name, mark.checked(name, getattr(self, name)))

    def run(self, data: Data, kinds: Mapping[str, str], force: bool) -> Data:
        check_data(data, kinds)
        random = new_random()
        if force or self.always_apply or random.random() < self.p:
            return self.draw(random, data["image"]).apply(data, kinds)
        return data

    @abstractmethod
    def draw(self, random: Random, image: pyvips.Image) -> Change:
        """Return the change of this call, for data whose image is `image`."""

    def drawn(self, random: Random, name: str) -> float:
        """A number drawn evenly from the range that the argument `name` stands for."""
        mark = _marks(type(self))[name]
        assert isinstance(mark, Within)
        return random.uniform(*interval(name, getattr(self, name), mark.low))


@cache
def _marks(transform: type[Transform]) -> dict[str, Mark]:
    """Marks of the arguments of a transform, by name."""
    hints = get_type_hints(transform, include_extras=True)
    return {name: mark for name, hint in hints.items() for mark in getattr(hint, "__metadata__", ())}


def new_random() -> Random:
    """A generator that is seeded from torch's default one, and so advances it by one draw."""
    return Random(int(torch.randint(2**62, (), device="cpu")))


def check_data(data: Data, kinds: Mapping[str, str]) -> None:
    """Raises TypeError or ValueError for data that the transforms cannot take."""
    if data.get("image") is None:
        raise ValueError(f"no image was given, only {sorted(data)}; write transform(image=image, ...)")
    for name, value in data.items():
        kind = kinds.get(name)
        if name in ("bboxes", "keypoints") and value is not None:
            raise ValueError(f"{name} are not supported and would not move with the image; give a mask instead")
        if kind == "masks" and value is not None:
            if not isinstance(value, list | tuple):
                raise TypeError(f"{name} is of type {type(value).__name__}; expected a list of pyvips images")
            for index, mask in enumerate(value):
                _check_image(f"{name}[{index}]", mask)
        elif kind is not None and value is not None:
            _check_image(name, value)


def _check_image(name: str, value: Any) -> None:
    if isinstance(value, pyvips.Image):
        return
    if isinstance(value, np.ndarray):
        given, advice = f"a numpy array of shape {value.shape}", "make one of an array (H, W, C) with new_from_array"
    elif isinstance(value, torch.Tensor):
        given, advice = f"a torch tensor of shape {tuple(value.shape)}", "ToTensor comes last, after all others"
    else:
        given, advice = f"of type {type(value).__name__}", "open a file with pyvips.Image.new_from_file(path)"
    raise TypeError(f"{name} is {given}; expected a pyvips.Image: {advice}")
