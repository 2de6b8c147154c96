"""Wrong configurations: each is refused in a line with path, value and what was expected."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Protocol, TypedDict

import pytest

from tests.config.parts import MODEL, PARTS, SECTIONS
from widefield.config import ConfigError, build, check_config, check_value, load, override
from widefield.registry import Range


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my.yaml"
    path.write_text(MODEL)
    return path


WRONG = [
    ("model.body.depth=19", "model.body.depth: got 19, expected one of 18, 34"),
    ("model.body.depth=true", "model.body.depth: got true, expected one of 18, 34"),
    ("model.body.depth='18'", "model.body.depth: got '18', expected one of 18, 34"),
    ("model.body.depht=18", "model.body.depht: there is no 'depht'; did you mean depth?"),
    ("model.bodi.depth=18", "model.bodi: there is no 'bodi'; did you mean body?"),
    ("modle.body.depth=18", "modle: no such key; did you mean model?"),
    (
        "model.body.style=cafe",
        "model.body.style: got 'cafe', expected one of 'pytorch', 'caffe'; did you mean 'caffe'?",
    ),
    ("model.body.rate=high", "model.body.rate: got 'high', expected a number"),
    ("model.body.rate=true", "model.body.rate: got true, expected a number"),
    ("model.body.frozen=1", "model.body.frozen: got 1, expected true or false"),
    ("model.body.frozen=yes", "model.body.frozen: got 'yes', expected true or false"),
    ("model.body.strides=2", "model.body.strides: got 2, expected a list of int"),
    ("model.body.strides=[1, two]", "model.body.strides.1: got 'two', expected int"),
    ("model.body.name=3", "model.body.name: got 3, expected a text or null"),
    ("model.body.norm=BN", "model.body.norm: got 'BN', expected a dictionary or null"),
    ("model.body=ResNet", "model.body: got 'ResNet', expected {type: a body, ...}"),
    ("model.body={type: ResNext}", "model.body: no body named 'ResNext'; did you mean ResNet"),
    ("model.body={type: L1}", "model.body: L1 is a loss, expected a body: Net, ResNet, SmallResNet"),
    (
        "model.body={type: SmallResNet, smal: 1}",
        "model.body.smal: SmallResNet has no argument 'smal'; did you mean small?",
    ),
    ("model.body={_delete_: true, depth: 18}", "model.body: no type among depth; name the component"),
    ("model.body={_delete_: true, type: ResNet}", "model.body: ResNet needs depth"),
    ("model.body={_delete_: true, type: 18}", "model.body: type is 18"),
    ("model.head.classes=three", "model.head.classes: got 'three', expected int"),
    ("model.head.classes=3.5", "model.head.classes: got 3.5, expected int"),
    ("model.head.classes=null", "model.head.classes: got null, expected int"),
    ("model.head.size=[1, 2, 3]", "model.head.size: got [1, 2, 3], expected a list of 2 (int, int)"),
    ("model.head.topk=(1,x)", "model.head.topk.1: got 'x', expected int"),
    ("model.head.mode=QUICK", "model.head.mode: got 'QUICK', expected one of FAST, SLOW"),
    ("model.head.crop={width: 3}", "model.head.crop: Crop needs height"),
    ("model.head.crop={height: 3, wide: 3}", "model.head.crop.wide: Crop has no argument 'wide'; did you mean width?"),
    ("model.head.file=3", "model.head.file: got 3, expected a Path or null"),
    ("model.head.level=low", "model.head.level: got 'low', expected int"),
    ("model.head.scales={a: b}", "model.head.scales.a: got 'b', expected a number"),
    ("model.head.activation=math.nothing", "model.head.activation: math has no 'nothing'"),
    ("model.head.old=x", "model.head.old: got 'x', expected int or null"),
    ("model.head.loss.type=Smooth", "model.head.loss: Smooth needs eps"),
    ("model.head.loss.eps=1", "model.head.loss.eps: there is no 'eps'; there are weight"),
    ("model.necks.1.eps=x", "model.necks.1.eps: got 'x', expected a number"),
    ("model.necks.2.eps=1", "model.necks.2: a list of 2 has no item 2; give an index from 0"),
    ("model.necks.first.eps=1", "model.necks.first: a list of 2 has no item first"),
    ("model.head.classes.x=1", "model.head.classes.x: model.head.classes is 3, which has no 'x' in it"),
    ("model=3", "model: got 3, expected a dictionary"),
    ("model={type: Modell}", "model: no model named 'Modell'; did you mean Model?"),
    ("model={_delete_: true}", "model: names no type"),
    ("trainer.max_epoch=3", "trainer.max_epoch: there is no 'max_epoch'; did you mean max_epochs?"),
    ("trainer.max_epochs=many", "trainer.max_epochs: got 'many', expected int or null"),
    ("trainer.precision=16", "trainer.precision: got 16, expected one of '32', '16-mixed'"),
    ("trainer.callbacks=[{type: Stoping}]", "trainer.callbacks.0: no Callback named 'Stoping'; did you mean Stopping?"),
    ("trainer.callbacks=[{type: Stopping}]", "trainer.callbacks.0: Stopping needs monitor"),
    ("trainer.callbacks=[{type: fractions.Fraction}]", "trainer.callbacks.0: fractions.Fraction is no Callback"),
    ("trainer.callbacks.0.patiense=3", "trainer.callbacks.0.patiense: there is no 'patiense'; did you mean patience?"),
    ("trainer.callbacks=[3]", "trainer.callbacks.0: got 3, expected a Callback"),
    ("seed=x", "seed: got 'x', expected int"),
]


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[text for text, _ in WRONG])
def test_a_wrong_value_is_refused_in_one_line(file: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(override(load(file), [text], SECTIONS), SECTIONS)
    line = str(caught.value)
    assert line.startswith(message)
    assert "\n" not in line
    assert line.endswith((f"(override {text})", ", line 3)", ", line 2)"))


RIGHT = [
    "trainer.callbacks.0.patience=3",
    "model.body.depth=34",
    "model.body.rate=1",
    "model.body.rate=1e-3",
    "model.body.strides=(1,2)",
    "model.body.name=None",
    "model.body.norm={type: BN}",
    "model.body.type=tests.config.parts.SmallResNet",
    "model.body={type: SmallResNet, small: 2, rate: .5}",
    "model.head=null",
    "model.head.topk=5",
    "model.head.topk=[1, 5]",
    "model.head.mode=SLOW",
    "model.head.crop.height=3",
    "model.head.crop={height: 3}",
    "model.head.file=a/b.pth",
    "model.head.activation=math.sqrt",
    "model.head.untyped={anything: [goes, 1]}",
    "model.head.old=null",
    "--model.init_args.head.init_args.loss.class_path=L1",
    "trainer.max_epochs=null",
    "trainer.callbacks=[{class_path: Stopping, init_args: {monitor: loss}}]",
    "trainer.callbacks=[{type: tests.config.parts.Stopping, monitor: loss}]",
    "seed=3",
]


@pytest.mark.parametrize("text", RIGHT)
def test_what_the_constructors_take_is_not_refused(file: Path, text: str) -> None:
    check_config(override(load(file), [text], SECTIONS), SECTIONS)


def test_all_problems_are_said_at_once_with_file_and_line(file: Path) -> None:
    file.write_text(MODEL.replace("depth: 18", "depth: 19").replace("classes: 3", "clases: 3"))
    with pytest.raises(ConfigError) as caught:
        check_config(load(file), SECTIONS)
    assert str(caught.value).splitlines() == [
        "model.body.depth: got 19, expected one of 18, 34 (my.yaml, line 5)",
        "model.head.clases: Head has no argument 'clases'; did you mean classes? (my.yaml, line 9)",
        "model.head: Head needs classes (my.yaml, line 7)",
    ]


def test_a_constructor_that_refuses_its_arguments_is_located(file: Path) -> None:
    assert build(load(file), ("model",), PARTS).head.loss.weight == 0.5
    config = override(load(file), ["model.body.rate=-1"], SECTIONS)
    check_config(config, SECTIONS)
    with pytest.raises(ConfigError, match=r"^model\.body: rate=-1 must not be negative \(my\.yaml, line 3\)$"):
        build(config, ("model",), PARTS)


class _Reads(Protocol):
    def read(self) -> str: ...


class _Table(TypedDict):
    width: int


class _Options(TypedDict):
    width: Annotated[int, Range(1)]
    depth: NotRequired[int]


@pytest.mark.parametrize(
    ("annotation", "right", "wrong", "words"),
    [
        (Annotated[int, {"not": "hashable"}], [1], ["x"], "int"),
        (_Table, [{"width": 1}], [3], "a dictionary"),
        (_Reads, ["anything", 3], [], ""),
        (type[int], ["builtins.int"], [], ""),
        (Annotated[int, Range(1)], [1, 9], [0, -1, 1.5, "x", None], "int, at least 1"),
        (Annotated[float, Range(0, 1)] | None, [0, 0.5, 1, None], ["x"], "a number, from 0 to 1 or null"),
        (Annotated[float, Range(0)] | None, [0, 9.5, None], [-0.1, float("inf"), float("nan")], "a number, at least 0"),
        (_Options, [{"width": 1}, {"width": 1, "depth": 2}], [{"width": 0}, {"depth": 2}, {"width": 1, "deep": 2}], ""),
        (float | Literal["auto"], [1, 1.5, "auto"], ["x", True], "a number or 'auto'"),
        (list[dict[str, int]], [[], [{"a": 1}]], [{"a": 1}], "a list of a dictionary"),
        (tuple[int, ...] | None, [None, [], [1]], [[None]], ""),
        (dict, [{}], [[]], "a dictionary"),
        (Sequence, [[1, "x"]], ["text", 3], "a list"),
        (bool, [True], [1, "yes"], "true or false"),
        (Iterable[str], [["a"]], ["a"], "a list of a text"),
    ],
    ids=str,
)
def test_values_against_annotations(annotation: Any, right: list[Any], wrong: list[Any], words: str) -> None:
    assert [value for value in right if check_value(value, annotation)] == []
    assert [value for value in wrong if not check_value(value, annotation)] == []
    if words:
        assert str(check_value(wrong[0], annotation)[0][1]).endswith(f"expected {words}")
