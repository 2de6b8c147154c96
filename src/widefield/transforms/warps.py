"""Warps that interpolate. Images and masks are warped alike; masks take the nearest pixel by default."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, TypeAlias

import numpy as np
import pyvips

from widefield.transforms.base import Change, Transform
from widefield.transforms.values import BORDERS, Choice, Fill, Limit, Within, background, full_scale, interval


@dataclass(frozen=True)
class _Named(Choice):
    """A name, or a `pyvips.Interpolate`, of which transforms keep the name, as it does not pickle itself."""

    def checked(self, name: str, value: Any) -> Any:
        return super().checked(name, value.get("nickname") if isinstance(value, pyvips.Interpolate) else value)


Interpolation: TypeAlias = Annotated[str | Any, _Named(("nearest", "bilinear", "bicubic", "lbb", "nohalo", "vsqbs"))]
RotateMethod: TypeAlias = Annotated[str, Choice(("largest_box", "ellipse"))]

Limits = float | Sequence[float] | Mapping[str, float | Sequence[float]] | None
"""A number, a range (lowest, highest), or either per axis under "x" and "y"."""

FIELD_SIGMA = 8.0
"""A smooth displacement field is computed on a grid this fine or finer, in grid points per standard deviation."""


@dataclass(frozen=True)
class Rotate(Transform):
    """Rotates clockwise by an angle drawn evenly. The canvas grows to hold the whole rotated image.

    Args:
        limit: Range (lowest, highest) of the angle in degrees; a number v stands for (-v, v).
        interpolation: For images: "nearest", "bilinear", "bicubic", "lbb", "nohalo", "vsqbs", or a `pyvips.Interpolate`.
        value: Of new pixels of images, in the image's own units, for all channels or one each. None for white: full scale, which
            is 255 for 8 bits and 1 for floats.
        mask_value: Of new pixels of masks.
        rotate_method: Without effect: it is about bounding boxes.
        crop_border: Cut out the largest upright rectangle without new pixels.

    Raises:
        ValueError: An argument out of range. When called: as many values as fit no image.
    """

    limit: Annotated[Limit, Within()] = 90
    interpolation: Interpolation = "bilinear"
    value: Fill | None = None
    mask_value: Fill = 0
    rotate_method: RotateMethod = "largest_box"
    crop_border: bool = False

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        angle = self.drawn(random, "limit")
        height, width = image.height, image.width
        whole = _holding_all(_linear((1, 1), (0, 0), -angle), height, width)

        def rotate(image: pyvips.Image, interpolation: str, fill: list[float]) -> pyvips.Image:
            image = whole.apply(image, interpolation, "background", fill)
            return _crop_centre(image, *_largest_inside(height, width, angle)) if self.crop_border else image

        return Change(
            lambda image: rotate(image, self.interpolation, background(self.value, image, full_scale(image))),
            lambda mask: rotate(mask, "nearest", background(self.mask_value, mask, 0)),
        )


@dataclass(frozen=True)
class Affine(Transform):
    """Scales, shears, rotates and shifts about the centre, in this order, by amounts drawn evenly.

    Each amount is a number, which is then fixed, a range (lowest, highest), or a dict with either under "x" and "y"; a missing
    axis stays. Both axes draw for themselves. With no amount given, scale is 0.9 to 1.1, the shift 10%, the rotation 15 degrees
    and the shear 10 degrees at most.

    Args:
        scale: Factors; above 1 magnifies.
        translate_percent: Shift to the right and down, as a fraction of width and height.
        translate_px: The same in whole pixels; only one of the two.
        rotate: Angle in degrees, counter-clockwise.
        shear: Angle in degrees by which the axis tilts.
        interpolation: For images, as for `Rotate`.
        mask_interpolation: For masks.
        cval: Of new pixels of images, as `value` of `Rotate`.
        cval_mask: Of new pixels of masks.
        mode: What new pixels are: "background" for `cval`, or "black", "white", "copy" (of the border), "repeat", "mirror".
        fit_output: Let the canvas hold just the whole result, wherever it was shifted.
        keep_ratio: Scale both axes alike.
        rotate_method: Without effect: it is about bounding boxes.

    Raises:
        ValueError: An argument out of range, or two kinds of shift. When called: as many values as fit no image.
    """

    scale: Limits = None
    translate_percent: Limits = None
    translate_px: Limits = None
    rotate: float | Sequence[float] | None = None
    shear: Limits = None
    interpolation: Interpolation = "bilinear"
    mask_interpolation: Interpolation = "nearest"
    cval: Fill | None = None
    cval_mask: Fill = 0
    mode: Annotated[str, Choice(BORDERS)] = "background"
    fit_output: bool = False
    keep_ratio: bool = False
    rotate_method: RotateMethod = "largest_box"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.translate_percent is not None and self.translate_px is not None:
            raise ValueError(
                f"translate_percent={self.translate_percent} and translate_px={self.translate_px} exclude each other; give one"
            )
        limits = self._limits()
        scale_x, scale_y = limits["scale"]
        if min(scale_x[0], scale_y[0]) <= 0:
            raise ValueError(f"scale={self.scale!r}; expected factors above 0")
        if self.keep_ratio and scale_x != scale_y:
            raise ValueError(f"scale={self.scale!r} with keep_ratio=True; expected the same for x and y")
        if any(limit != round(limit) for axis in limits["translate_px"] for limit in axis):
            raise ValueError(f"translate_px={self.translate_px!r}; expected whole pixels, or use translate_percent")

    def _limits(self) -> dict[str, list[tuple[float, float]]]:
        """(lowest, highest) of x and y by amount."""
        given = {name: getattr(self, name) for name in _UNCHANGED}
        if all(value is None for value in given.values()):
            given = {**given, **_BY_DEFAULT}
        return {name: [_axis(name, given[name], axis, same) for axis in "xy"] for name, same in _UNCHANGED.items()}

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        height, width = image.height, image.width
        limits = self._limits()
        scale, shear, percent = ([random.uniform(*axis) for axis in limits[name]] for name in _DRAWN_PER_AXIS)
        pixels = [random.randint(int(low), int(high)) for low, high in limits["translate_px"]]
        angle = random.uniform(*limits["rotate"][0])
        shift = [percent[0] * width + pixels[0], percent[1] * height + pixels[1]]
        matrix = _linear(scale if not self.keep_ratio else [scale[0]] * 2, shear, angle)
        if self.fit_output:
            linear = _holding_all(matrix, height, width)
        else:
            centre = np.array([(width - 1) / 2, (height - 1) / 2])
            linear = _LinearMap(matrix, centre - matrix @ centre + shift, height, width)

        def warp(image: pyvips.Image, interpolation: str, fill: list[float]) -> pyvips.Image:
            return linear.apply(image, interpolation, self.mode, fill)

        return Change(
            lambda image: warp(image, self.interpolation, background(self.cval, image, full_scale(image))),
            lambda mask: warp(mask, self.mask_interpolation, background(self.cval_mask, mask, 0)),
        )


_UNCHANGED = {"scale": 1.0, "translate_percent": 0.0, "translate_px": 0.0, "rotate": 0.0, "shear": 0.0}
_BY_DEFAULT = {"scale": (0.9, 1.1), "translate_percent": (-0.1, 0.1), "rotate": (-15.0, 15.0), "shear": (-10.0, 10.0)}
_DRAWN_PER_AXIS = ("scale", "shear", "translate_percent")


@dataclass(frozen=True)
class ElasticTransform(Transform):
    """Shifts every pixel by a smooth random field (Simard, Steinkraus and Platt, ICDAR 2003).

    The field is noise, even in -1..1 per pixel, smoothed by a Gaussian and multiplied by `alpha`; what is smoothed widely is
    computed on a coarser grid with noise of the same strength. Its standard deviation is about 0.16 alpha / sigma pixels: with
    the defaults nothing moves visibly.

    Args:
        alpha: Strength, in pixels.
        sigma: Standard deviation of the Gaussian, in pixels.
        interpolation: For images, as for `Rotate`.
        value: Of new pixels of images, as for `Rotate`.
        mask_value: Of new pixels of masks; None for 0.
        always_apply: Apply it whatever `p` is.
        same_dxdy: Shift both axes alike.
        p: Probability that it is applied.

    Raises:
        ValueError: An argument out of range. When called: as many values as fit no image.
    """

    alpha: float = 1.0
    sigma: float = 50.0
    interpolation: Interpolation = "bilinear"
    value: Fill | None = None
    mask_value: Fill | None = None
    always_apply: bool = False
    same_dxdy: bool = False
    p: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma < math.inf or not math.isfinite(self.alpha):
            raise ValueError(
                f"alpha={self.alpha!r} and sigma={self.sigma!r}; expected finite numbers, and sigma above 0"
            )

    def draw(self, random: Random, image: pyvips.Image) -> Change:
        dx = self._field(random, image.height, image.width)
        dy = dx if self.same_dxdy else self._field(random, image.height, image.width)
        where = pyvips.Image.xyz(image.width, image.height) + dx.bandjoin(dy)

        def warp(image: pyvips.Image, interpolation: str, fill: list[float]) -> pyvips.Image:
            return image.mapim(
                where + _centre(interpolation),
                interpolate=pyvips.Interpolate.new(interpolation),
                background=fill,
                premultiplied=True,  # see _LinearMap
            )

        return Change(
            lambda image: warp(image, self.interpolation, background(self.value, image, full_scale(image))),
            lambda mask: warp(mask, "nearest", background(self.mask_value, mask, 0)),
        )

    def _field(self, random: Random, height: int, width: int) -> pyvips.Image:
        step = max(1.0, self.sigma / FIELD_SIGMA)
        size = math.ceil(width / step) + 2, math.ceil(height / step) + 2
        # Smoothed noise is Gaussian; sqrt(1/3) is the deviation of numbers even in -1..1, and 1/step that of the sum over
        # the step^2 pixels of a coarse one against as many of them.
        noise = pyvips.Image.gaussnoise(*size, sigma=self.alpha / math.sqrt(3) / step, mean=0, seed=_seed(random))
        field = noise.gaussblur(self.sigma / step, min_ampl=0.02, precision="float")
        return (
            field.affine([step, 0, 0, step], oarea=[0, 0, width, height])
            if step > 1
            else field.crop(0, 0, width, height)
        )


@dataclass(frozen=True)
class _LinearMap:
    """Moves the pixel at (x, y) to `matrix` @ (x, y) + `offset` on a canvas of `height` and `width`."""

    matrix: np.ndarray
    offset: np.ndarray
    height: int
    width: int

    def apply(self, image: pyvips.Image, interpolation: str, mode: str, fill: list[float]) -> pyvips.Image:
        offset = self.offset - self.matrix @ np.full(2, _centre(interpolation))
        return image.affine(
            self.matrix.ravel().tolist(),
            odx=offset[0],
            ody=offset[1],
            oarea=[0, 0, self.width, self.height],
            interpolate=pyvips.Interpolate.new(interpolation),
            extend=mode,
            background=fill,
            premultiplied=True,  # or the last one of 4 or more channels would be multiplied into the others, as alpha
        )


def _centre(interpolation: str) -> float:
    """Return the offset of positions: libvips rounds them down for the nearest pixel."""
    return 0.5 if interpolation == "nearest" else 0.0


def _holding_all(matrix: np.ndarray, height: int, width: int) -> _LinearMap:
    """The map with the smallest canvas that holds the whole image."""
    corners = matrix @ np.array([[0, width - 1, 0, width - 1], [0, 0, height - 1, height - 1]])
    # rounding up is for fractions of a pixel, not for the last digit of a sine
    across, down = (math.ceil(extent - 1e-6) + 1 for extent in np.ptp(corners, axis=1))
    offset = np.array([across - 1, down - 1]) / 2 - matrix @ [(width - 1) / 2, (height - 1) / 2]
    return _LinearMap(matrix, offset, down, across)


def _seed(random: Random) -> int:
    return random.randrange(2**31)


def _axis(name: str, value: Any, axis: str, unchanged: float) -> tuple[float, float]:
    if isinstance(value, Mapping):
        if not value or set(value) - {"x", "y"}:
            raise ValueError(f'{name}={dict(value)!r}; expected a dict with "x", "y" or both')
        value = value.get(axis, unchanged)
    value = unchanged if value is None else value
    return interval(name, (value, value) if isinstance(value, int | float) else value)


def _linear(scale: Sequence[float], shear: Sequence[float], angle: float) -> np.ndarray:
    """The matrix that scales, then shears, then rotates counter-clockwise; the y axis points down."""
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    tilt_x, tilt_y = (math.tan(math.radians(tilt)) for tilt in shear)
    rotate = np.array([[cos, sin], [-sin, cos]])
    matrix = rotate @ np.array([[1, tilt_x], [0, 1]]) @ np.array([[1, 0], [tilt_y, 1]]) @ np.diag(scale)
    return matrix.round(14)  # a quarter turn shall meet the pixels, not fall short of them by the last digit


def _largest_inside(height: int, width: int, angle: float) -> tuple[int, int]:
    """Height and width of the largest upright rectangle inside of the rotated image.

    A rectangle (a, b) fits if a cos + b sin <= width and a sin + b cos <= height. The area is largest where it touches one of
    these bounds in the bound's middle, or both.
    """
    cos, sin = abs(math.cos(math.radians(angle))), abs(math.sin(math.radians(angle)))
    if min(cos, sin) < 1e-9:
        return (height, width) if cos > sin else (width, height)
    candidates = [(width / cos / 2, width / sin / 2), (height / sin / 2, height / cos / 2)]
    if abs(cos - sin) > 1e-9:
        bounds = np.array([[cos, sin], [sin, cos]])
        candidates.append(tuple(np.linalg.solve(bounds, [width, height])))
    fitting = [(a, b) for a, b in candidates if a * cos + b * sin < width + 1e-6 and a * sin + b * cos < height + 1e-6]
    across, down = max(fitting, key=lambda size: size[0] * size[1])
    return max(1, int(down) - 2), max(1, int(across) - 2)  # the pixels at the corners are interpolated with new ones


def _crop_centre(image: pyvips.Image, height: int, width: int) -> pyvips.Image:
    return image.crop((image.width - width) // 2, (image.height - height) // 2, width, height)
