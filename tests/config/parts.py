"""Components and sections that the tests of configurations describe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NewType

from widefield.config import Section
from widefield.registry import ComponentOf, Registry

PARTS = Registry("part", sequence="tests.config.parts:Chain")
Level = NewType("Level", int)


class Mode(Enum):
    FAST = 1
    SLOW = 2


@dataclass
class Crop:
    height: int
    width: int = 8


class Chain(list):
    def __init__(self, *parts: Any) -> None:
        super().__init__(parts)


class Body:
    component_kind = "body"


@PARTS.register_module(aliases="Net")
class ResNet(Body):
    """A body.

    Args:
        depth: How many layers.
    """

    def __init__(
        self,
        depth: Literal[18, 34],
        *,
        style: Literal["pytorch", "caffe"] = "pytorch",
        rate: float = 0.0,
        frozen: bool = False,
        strides: Sequence[int] = (1, 2),
        name: str | None = None,
        norm: dict[str, Any] | None = None,
    ) -> None:
        if rate < 0:
            raise ValueError(f"rate={rate} must not be negative")
        self.depth, self.strides, self.norm = depth, strides, norm


@PARTS.register_module()
class SmallResNet(ResNet):
    def __init__(self, depth: Literal[18, 34] = 18, *, small: int = 1, **kwargs: Any) -> None:
        super().__init__(depth, **kwargs)


@PARTS.register_module(kind="loss")
class L1:
    def __init__(self, weight: float = 1.0) -> None:
        self.weight = weight


@PARTS.register_module(kind="loss")
class Smooth:
    def __init__(self, eps: float, weight: float = 1.0) -> None: ...


@PARTS.register_module(kind="head")
class Head:
    def __init__(
        self,
        classes: int,
        loss: Annotated[L1 | dict[str, Any], ComponentOf(PARTS, "loss")] = {"type": "L1", "weight": 2.0},  # noqa: B006
        size: tuple[int, int] = (1, 1),
        topk: int | tuple[int, ...] = (1,),
        mode: Mode = Mode.FAST,
        crop: Crop | None = None,
        file: Path | None = None,
        level: Level = Level(0),
        scales: dict[str, float] | None = None,
        activation: Callable[[Any], Any] = abs,
        untyped=None,
        old: int = None,  # type: ignore[assignment]  # noqa: RUF013
    ) -> None:
        self.loss = PARTS.build(loss)


@PARTS.register_module(kind="model")
class Model:
    def __init__(
        self,
        body: Annotated[Body | dict[str, Any], ComponentOf(PARTS, "body")],
        head: Annotated[Head | dict[str, Any] | None, ComponentOf(PARTS, "head")] = None,
        necks: Annotated[list[dict[str, Any]], ComponentOf(PARTS)] = [],  # noqa: B006
    ) -> None:
        self.body, self.head = PARTS.build(body), head and PARTS.build(head)


class Trainer:
    def __init__(
        self,
        max_epochs: int | None = None,
        precision: Literal["32", "16-mixed"] = "32",
        callbacks: list["Callback"] = (),
    ) -> None: ...


class Callback: ...


class Stopping(Callback):
    def __init__(self, monitor: str, patience: int = 3) -> None: ...


SECTIONS: dict[str, Any] = {
    "model": Section(component=ComponentOf(PARTS, "model")),
    "trainer": Section(default="tests.config.parts:Trainer", base="tests.config.parts:Trainer"),
    "seed": int,
    "imports": list[str],
}

MODEL = """\
model:
  type: Model
  body:
    type: ResNet
    depth: 18
    style: caffe
  head:
    type: Head
    classes: 3
    loss:
      type: L1
      weight: 0.5
  necks:
    - type: L1
    - type: Smooth
      eps: 1e-1
trainer:
  max_epochs: 2
  callbacks:
    - {type: Stopping, monitor: loss}
"""
