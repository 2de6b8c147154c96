"""Several transforms as one, one that does nothing, and functions of the user's."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any

import pyvips

from widefield.transforms.base import KINDS, Change, Data, Step, Transform, check_data, new_random

AnyTransform = Callable[..., Data]
"""One of this package, or any callable that takes data by name and returns a dict."""


class Group(Step):
    """Transforms that are applied in some order; subclasses are frozen dataclasses."""

    transforms: Sequence[AnyTransform]

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not isinstance(self.transforms, Sequence):
            given = type(self.transforms).__name__
            raise TypeError(f"{name} takes a list of transforms, such as {name}([...]): got one of type {given}")
        for index, transform in enumerate(self.transforms):
            if isinstance(transform, type):
                raise TypeError(
                    f"entry {index} of {name} is the class {transform.__name__}; call it with its arguments"
                )
            if not callable(transform):
                raise TypeError(f"entry {index} of {name} is {transform!r}; expected a transform or a callable")

    def __len__(self) -> int:
        return len(self.transforms)

    def __getitem__(self, index: int) -> AnyTransform:
        return self.transforms[index]

    def __repr__(self) -> str:
        lines = [textwrap.indent(f"{transform!r},\n", "  ") for transform in self.transforms]
        options = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "transforms"]  # type: ignore[arg-type]
        return f"{type(self).__name__}([\n{''.join(lines)}], {', '.join(options)})"


@dataclass(frozen=True, repr=False)
class Compose(Group):
    """Applies transforms one after the other.

    Args:
        transforms: Transforms of this package, or callables that take data by name and return a dict.
        bbox_params: Not supported; only None.
        keypoint_params: Not supported; only None.
        additional_targets: Further names of data, each with the name it is treated as: `{"image2": "image"}`.
        p: Probability that the transforms are applied. Otherwise only those with `always_apply=True` are.
        is_check_shapes: Refuse images and masks of different height or width.

    Raises:
        TypeError: `transforms` is no list of transforms.
        ValueError: An argument out of range, or boxes or keypoints asked for. When called: images and masks differ in size.
    """

    transforms: Sequence[AnyTransform]
    bbox_params: None = None
    keypoint_params: None = None
    additional_targets: Mapping[str, str] | None = None
    p: float = 1.0
    is_check_shapes: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bbox_params is not None or self.keypoint_params is not None:
            raise ValueError(
                "bbox_params and keypoint_params are not supported; leave them out, and give masks instead"
            )
        for name, kind in (self.additional_targets or {}).items():
            if kind not in KINDS:
                raise ValueError(f"additional_targets has {name!r}: {kind!r}; expected one of {list(KINDS)}")

    def run(self, data: Data, kinds: Mapping[str, str], force: bool) -> Data:
        kinds = {**kinds, **(self.additional_targets or {})}
        check_data(data, kinds)
        if self.is_check_shapes:
            _check_sizes(data, kinds)
        applied = force or new_random().random() < self.p
        return _run_all(self.transforms if applied else _always_applied(self.transforms), data, kinds)


@dataclass(frozen=True, repr=False)
class Sequential(Group):
    """Applies transforms one after the other, as one entry of `OneOf` or `SomeOf`.

    Args:
        transforms: As for `Compose`.
        p: Its weight within `OneOf` and `SomeOf`; elsewhere it is always applied.
    """

    transforms: Sequence[AnyTransform]
    p: float = 0.5

    def run(self, data: Data, kinds: Mapping[str, str], force: bool) -> Data:
        return _run_all(self.transforms, data, kinds)


@dataclass(frozen=True, repr=False)
class OneOf(Group):
    """Applies one of its transforms, drawn with their `p` as weights; a callable without `p` weighs 1.

    Args:
        transforms: As for `Compose`.
        p: Probability that one is applied.
    """

    transforms: Sequence[AnyTransform]
    p: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weights(self)

    def run(self, data: Data, kinds: Mapping[str, str], force: bool) -> Data:
        random = new_random()
        if not force and random.random() >= self.p:
            return data
        (chosen,) = random.choices(self.transforms, _weights(self.transforms))
        return _run_one(chosen, data, kinds, force=True)


@dataclass(frozen=True, repr=False)
class SomeOf(Group):
    """Applies `n` of its transforms in the order drawn, with their `p` as weights; a callable without `p` weighs 1.

    Args:
        transforms: As for `Compose`.
        n: How many.
        replace: Whether the same one may be drawn again.
        p: Probability that any are applied.
    """

    transforms: Sequence[AnyTransform]
    n: int
    replace: bool = True
    p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        possible = _check_weights(self)
        if not isinstance(self.n, int) or self.n < 1 or (not self.replace and self.n > possible):
            most = "" if self.replace else f" and, without replacement, at most {possible}"
            raise ValueError(f"n={self.n!r} of SomeOf; expected an integer of at least 1{most}")

    def run(self, data: Data, kinds: Mapping[str, str], force: bool) -> Data:
        random = new_random()
        if not force and random.random() >= self.p:
            return data
        for transform in self._draw(random):
            data = _run_one(transform, data, kinds, force=True)
        return data

    def _draw(self, random: Random) -> list[AnyTransform]:
        if self.replace:
            return random.choices(self.transforms, _weights(self.transforms), k=self.n)
        left, drawn = list(range(len(self))), []
        for _ in range(self.n):
            (index,) = random.choices(left, _weights([self.transforms[i] for i in left]))
            left.remove(index)
            drawn.append(self.transforms[index])
        return drawn


@dataclass(frozen=True, repr=False)
class OneOrOther(Group):
    """Applies one of two transforms.

    Args:
        first: Applied with probability `p`.
        second: Applied otherwise.
        transforms: Both, instead of `first` and `second`.
        p: Probability of the first.
    """

    first: AnyTransform | None = None
    second: AnyTransform | None = None
    transforms: Sequence[AnyTransform] = ()
    p: float = 0.5

    def __post_init__(self) -> None:
        if not self.transforms and self.first is not None and self.second is not None:
            object.__setattr__(self, "transforms", (self.first, self.second))
        super().__post_init__()
        if len(self.transforms) != 2:
            raise ValueError(f"OneOrOther takes two transforms: got {len(self.transforms)}; give first and second")

    def __repr__(self) -> str:
        return f"OneOrOther({self.transforms[0]!r}, {self.transforms[1]!r}, p={self.p!r})"

    def run(self, data: Data, kinds: Mapping[str, str], force: bool) -> Data:
        chosen = self.transforms[0 if new_random().random() < self.p else 1]
        return _run_one(chosen, data, kinds, force=True)


def _run_all(transforms: Sequence[AnyTransform], data: Data, kinds: Mapping[str, str]) -> Data:
    for transform in transforms:
        data = _run_one(transform, data, kinds, force=False)
    return data


def _run_one(transform: AnyTransform, data: Data, kinds: Mapping[str, str], force: bool) -> Data:
    if isinstance(transform, Step):
        return transform.run(data, kinds, force)
    result = transform(**data)
    if not isinstance(result, dict):
        raise TypeError(f"{transform!r} returned {type(result).__name__}; expected a dict, such as {{'image': image}}")
    return result


def _always_applied(transforms: Sequence[AnyTransform]) -> list[AnyTransform]:
    return [transform for transform in _leaves(transforms) if getattr(transform, "always_apply", False)]


def _leaves(transforms: Sequence[AnyTransform]) -> Iterator[AnyTransform]:
    for transform in transforms:
        if isinstance(transform, Group):
            yield from _leaves(transform.transforms)
        else:
            yield transform


def _weights(transforms: Sequence[AnyTransform]) -> list[float]:
    return [getattr(transform, "p", 1.0) for transform in transforms]


def _check_weights(group: Group) -> int:
    """Return how many of its transforms can be drawn; ValueError if none can."""
    possible = sum(weight > 0 for weight in _weights(group.transforms))
    if not possible:
        raise ValueError(
            f"{type(group).__name__} has no transform to draw from: their p are the weights of the draw; "
            "give at least one transform with p above 0"
        )
    return possible


def _check_sizes(data: Data, kinds: Mapping[str, str]) -> None:
    sizes = {}
    for name, value in data.items():
        if kinds.get(name) is not None and value is not None:
            for image in value if kinds[name] == "masks" else [value]:
                sizes[image.height, image.width] = name
    if len(sizes) > 1:
        given = ", ".join(f"{name} is {height} x {width}" for (height, width), name in sizes.items())
        raise ValueError(
            f"images and masks differ in height x width: {given}; resize the masks, or pass is_check_shapes=False"
        )


@dataclass(frozen=True)
class NoOp(Transform):
    """Does nothing; an alternative within `OneOf`.

    Args:
        always_apply: Without effect.
        p: Its weight within `OneOf` and `SomeOf`.
    """

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return Change(_same)


@dataclass(frozen=True)
class Lambda(Transform, p=1.0):
    """Applies functions of the user's.

    Give functions with a name, not `lambda`, to a `DataLoader` that starts workers by spawning: they have to pickle.

    Args:
        image: Called with the pyvips image, returns one; None leaves images.
        mask: The same for masks.
        keypoint: Not supported; only None.
        bbox: Not supported; only None.
        name: Shown by `repr`.

    Raises:
        TypeError: What should be a function is none.
        ValueError: An argument out of range, or a function for boxes or keypoints.
    """

    image: Callable[[pyvips.Image], Any] | None = None
    mask: Callable[[pyvips.Image], Any] | None = None
    keypoint: None = None
    bbox: None = None
    name: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keypoint is not None or self.bbox is not None:
            raise ValueError("keypoint and bbox of Lambda are not supported; leave them out, and give masks instead")
        for name, function in (("image", self.image), ("mask", self.mask)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}={function!r} of Lambda; expected a function of one pyvips image")

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        return Change(self.image or _same, self.mask)


def _same(image: pyvips.Image) -> pyvips.Image:
    return image
