"""Files over files, and values over files."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.config.parts import MODEL, SECTIONS
from widefield.config import (
    Config,
    ConfigError,
    Foreign,
    check_config,
    load,
    merge,
    override,
    read_yaml,
    write_yaml,
)

LAYERS = [
    ({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}, {"a": {"x": 1, "y": 3}}),
    ({"a": [1, 2, 3]}, {"a": [4]}, {"a": [4]}),
    ({"a": 1}, {"a": None}, {"a": None}),
    ({"a": None}, {"a": {"x": 1}}, {"a": {"x": 1}}),
    ({"a": {"x": 1}}, {"a": 5}, {"a": 5}),
    ({"a": {"x": 1}}, {"a": {"_delete_": True, "y": 2}}, {"a": {"y": 2}}),
    ({"a": {"x": 1}}, {"a": {"_delete_": False, "y": 2}}, {"a": {"x": 1, "y": 2}}),
    ({"a": 1}, {"a": {"_delete_": True, "y": 2}}, {"a": {"y": 2}}),
    ({"a": {"type": "A", "x": 1}}, {"a": {"type": "B", "y": 2}}, {"a": {"type": "B", "y": 2}}),
    ({"a": {"type": "A", "x": 1}}, {"a": {"type": "A", "y": 2}}, {"a": {"type": "A", "x": 1, "y": 2}}),
    ({"a": {"x": 1}}, {"a": {"type": "A"}}, {"a": {"x": 1, "type": "A"}}),
    ({"a": [{"x": 1}, {"y": 2}]}, {"a": {1: {"z": 3}}}, {"a": [{"x": 1}, {"y": 2, "z": 3}]}),
    ({"a": [1, 2]}, {"a": {"0": 7}}, {"a": [7, 2]}),
    ({"a": [1, 2]}, {"a": {"_delete_": True, "0": 7}}, {"a": {"0": 7}}),
    ({}, {"a": {"_delete_": True, "b": {"_delete_": True, "c": 1}}}, {"a": {"b": {"c": 1}}}),
    ({"imports": ["a"]}, {"imports": ["b", "a"]}, {"imports": ["a", "b"]}),
]


@pytest.mark.parametrize(("base", "child", "merged"), LAYERS)
def test_merging_by_example(base: Any, child: Any, merged: Any) -> None:
    before = yaml.safe_dump([base, child])
    result = merge(Config(base), Config(child)).data
    assert result == merged
    assert list(result) == list(merged)
    assert yaml.safe_dump([base, child]) == before


@pytest.mark.parametrize(
    ("base", "child", "message"),
    [
        ({"a": 3}, {"a": {"x": 1}}, "a: a dictionary over 3; write _delete_: true"),
        ({"a": [1]}, {"a": {"x": 1}}, "a.x: the value is a list of 1; give indices"),
        ({"a": [1]}, {"a": {1: 1}}, "a.1: there is no item 1 in a list of 1"),
    ],
)
def test_what_cannot_be_merged_is_refused(base: Any, child: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merge(Config(base), Config(child))
    assert str(caught.value).startswith(message)


def leaves(data: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(data, dict) and data:
        return {key: value for name, item in data.items() for key, value in leaves(item, (*path, name)).items()}
    return {path: data}


names = st.sampled_from("abc")
trees = st.recursive(
    st.integers(0, 3) | st.none(), lambda parts: st.dictionaries(names, parts, max_size=3), max_leaves=8
)


@given(st.dictionaries(names, trees), st.dictionaries(names, trees))
def test_every_leaf_comes_from_the_child_or_else_from_the_base(base: dict[str, Any], child: dict[str, Any]) -> None:
    try:
        merged = merge(Config(base), Config(child)).data
    except ConfigError:
        return
    expected = dict(leaves(base))
    for path, value in leaves(child).items():
        if value == {} and any(held[: len(path)] == path and held != path for held in expected):
            continue  # an empty dictionary changes nothing in a dictionary
        expected = {
            held: kept for held, kept in expected.items() if held[: len(path)] != path and path[: len(held)] != held
        }
        expected[path] = value
    assert leaves(merged) == expected or not leaves(merged)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["no", "yes", "1e-3", "12:30", "2024-01-01", "null", "~", "<<", "0o17", "017", "=", "1_000", ""]),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=4), parts, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=4), values))
def test_what_is_written_reads_back_to_the_same_here_and_elsewhere(data: dict[str, Any]) -> None:
    text = write_yaml(data)
    assert read_yaml(text, "x.yaml").data == data
    assert yaml.safe_load(text) == data


def test_yaml_is_read_by_the_core_schema() -> None:
    text = "a: 1e-3\nb: no\nc: 12:30\nd: 2024-01-01\ne: 0x10\nf: True\ng: ~\nh: -.inf\ni: 1E5\nj: .5\nk:\nl: '1'"
    assert list(read_yaml(text, "x.yaml").data.values()) == [
        *(1e-3, "no", "12:30", "2024-01-01", 16, True, None, float("-inf"), 1e5, 0.5, None, "1"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "x.yaml, line 3: the key 'a' is given a second time"),
        ("a: [1", "x.yaml, line 1"),
        ("a:\n\t- 1", "x.yaml, line 2"),
        ("- 1", "x.yaml holds a list, not keys with values"),
        ("a: &x [*x]", "x.yaml holds an alias of something that contains it"),
        ("1.5: 2", "x.yaml, line 1: 1.5 is no key"),
        ("a: !!python/object/apply:os.getcwd []", "x.yaml, line 1"),
    ],
)
def test_wrong_yaml_is_refused_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "x.yaml")
    assert message in str(caught.value)


def test_anchors_and_merge_keys_work() -> None:
    assert read_yaml("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3", "x").data["b"] == {"x": 1, "y": 3}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.yaml").write_text(MODEL)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(text)


def test_bases_are_relative_to_the_file_and_their_bases_too(folder: Path) -> None:
    (folder / "base" / "deep.yaml").write_text("_base_: model.yaml\nmodel: {body: {depth: 34}}")
    write(folder, my_yaml="_base_: [base/deep.yaml]\nmodel: {head: {loss: {type: Smooth, eps: 0.1}}}")
    model = load(folder / "my.yaml").data["model"]
    assert model["body"] == {"type": "ResNet", "depth": 34, "style": "caffe"}
    assert model["head"]["loss"] == {"type": "Smooth", "eps": 0.1}
    assert "_base_" not in load(folder / "my.yaml").data


def test_each_value_knows_where_it_was_written(folder: Path) -> None:
    write(folder, my_yaml="_base_: base/model.yaml\nmodel:\n  body:\n    depth: 34")
    config = override(load(folder / "my.yaml"), ["model.head.classes=5"], SECTIONS)
    places = {path: str(config.origin(tuple(path.split(".")))) for path in ("model.body.depth", "model.body.style")}
    assert places == {"model.body.depth": "my.yaml, line 4", "model.body.style": "base/model.yaml, line 6"}
    assert str(config.origin(("model", "head", "classes"))) == "override model.head.classes=5"


def test_what_is_wrong_in_a_base_is_said_to_be_of_its_file(folder: Path) -> None:
    write(
        folder,
        base_py="depth = 18\nmodel = dict(\n    type='Model',\n    body=dict(type='ResNet',\n              depht=18),\n)\n"
        "late = dict(x=1)\nlate['x'] = 2\n",
        my_py="_base_ = 'base.py'\nmodel = dict(head=dict(classes=2))",
    )
    config = load(folder / "my.py")
    paths = ("model.body.depht", "model.body", "model.head.classes", "depth", "late.x")
    assert {path: str(config.origin(tuple(path.split(".")))) for path in paths} == {
        "model.body.depht": "base.py, line 5", "model.body": "base.py, line 4", "model.head.classes": "my.py, line 2",
        "depth": "base.py, line 1", "late.x": "base.py",
    }  # fmt: skip


def test_a_file_of_mmengine_is_told_of_the_conversion(folder: Path) -> None:
    write(folder, my_py="_base_ = ['base/model.yaml']\nx = _base_.model.depth")
    with pytest.raises(
        ConfigError, match=r"line 2: AttributeError: .*; `widefield config convert` reads files of MMEngine"
    ):
        load(folder / "my.py")


def test_python_and_yaml_build_on_each_other(folder: Path) -> None:
    write(
        folder,
        my_py="import math\n_base_ = 'base/model.yaml'\n_width = 2\ndef helper(): return _width\n"
        "model = dict(body=dict(strides=(1, helper()), rate=math.floor(1.5)))\n",
        top_yaml="_base_: my.py\nseed: 3",
    )
    data = load(folder / "top.yaml").data
    assert data["model"]["body"] == {"type": "ResNet", "depth": 18, "style": "caffe", "strides": [1, 2], "rate": 1}
    assert set(data) == {"model", "trainer", "seed"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = 1 / 0", "my.py, line 2: ZeroDivisionError: division by zero"),
        ("a = (", "my.py, line 1"),
        ("a = {'x': [1, object()]}", "a.x.1: a configuration holds dictionaries, lists"),
        ("a = dict(type=dict)", "a.type: a configuration holds .* name it by its import path"),
        ("a = {(1, 2): 3}", "a: .* is no key"),
    ],
)
def test_a_wrong_python_file_is_refused(folder: Path, text: str, message: str) -> None:
    write(folder, my_py=text)
    with pytest.raises(ConfigError, match=message):
        load(folder / "my.py")


def test_a_circle_of_bases_is_named(folder: Path) -> None:
    write(folder, a_yaml="_base_: b.yaml", b_yaml="_base_: c.yaml", c_yaml="_base_: b.yaml")
    with pytest.raises(ConfigError, match=r"in a circle: b\.yaml -> c\.yaml -> b\.yaml$"):
        load(folder / "a.yaml")


def test_bases_that_disagree_are_said_unless_the_file_decides(folder: Path) -> None:
    bases = "_base_: [a.yaml, b.yaml]\n"
    write(folder, a_yaml="x: {p: 1, q: 1}", b_yaml="x: {q: 2, r: 1}", c_yaml=bases, d_yaml=f"{bases}x: {{q: 3}}")
    with pytest.raises(
        ConfigError, match=r"^x\.q: the bases disagree: a\.yaml, line 1 and b\.yaml; write .* into c\.yaml"
    ):
        load(folder / "c.yaml")
    assert load(folder / "d.yaml").data == {"x": {"p": 1, "q": 3, "r": 1}}
    write(folder, e_yaml=f"{bases}x: {{_delete_: true, s: 3}}", b_yaml="x: {q: 1}")
    assert load(folder / "e.yaml").data == {"x": {"s": 3}}
    assert load(folder / "c.yaml").data == {"x": {"p": 1, "q": 1}}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("_base_: gone.yaml", FileNotFoundError, r"gone\.yaml, which my\.yaml names as _base_, does not exist"),
        ("_base_: base/modle.yaml", FileNotFoundError, r"did you mean model\.yaml\?"),
        ("_base_: 3", ConfigError, "_base_: got 3, expected a file or a list of files"),
        ("imports: 3", ConfigError, "imports: got 3"),
        ("_base_: base", FileNotFoundError, "does not exist"),
        ("a: {class_path: X, other: 1}", ConfigError, "a: other beside class_path"),
        ("a: {class_path: X, init_args: 1}", ConfigError, r"a\.init_args: got 1"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(folder: Path, text: str, error: type[Exception], message: str) -> None:
    write(folder, my_yaml=text)
    with pytest.raises(error, match=message):
        load(folder / "my.yaml")


def test_imports_are_relative_to_their_file_and_add_up(folder: Path) -> None:
    (folder / "base" / "parts.yaml").write_text("imports: parts.py")
    write(folder, my_yaml="_base_: base/parts.yaml\nimports: [mine.py, some.module]")
    names = [str(folder / "base/parts.py"), str(folder / "mine.py"), "some.module"]
    assert load(folder / "my.yaml").data == {"imports": names}


def test_configurations_of_lightning_read_as_ours(folder: Path) -> None:
    write(
        folder,
        their_yaml="trainer:\n  callbacks:\n    - class_path: Stopping\n      init_args: {monitor: loss}\n"
        "model:\n  class_path: Model\n  init_args:\n    body: {class_path: ResNet, init_args: {depth: 18}}",
        more_yaml="model: {init_args: {body: {init_args: {depth: 34}}}}",
    )
    data = load(folder / "their.yaml", folder / "more.yaml").data
    assert data["model"] == {"type": "Model", "body": {"type": "ResNet", "depth": 34}}
    assert data["trainer"] == {"callbacks": [{"type": "Stopping", "monitor": "loss"}]}


OVERRIDES = [
    (["model.body.depth=34"], ("body", "depth"), 34),
    (["model.body.rate=1"], ("body", "rate"), 1),
    (["model.body.type=SmallResNet"], ("body",), {"type": "SmallResNet"}),
    (["model.body.type=ResNet"], ("body",), {"type": "ResNet", "depth": 18, "style": "caffe"}),
    (["model.body.depth=34", "model.body.type=SmallResNet"], ("body",), {"type": "SmallResNet", "depth": 34}),
    (["model.body.small=2", "model.body.type=SmallResNet"], ("body",), {"type": "SmallResNet", "small": 2}),
    (["model.body={type: SmallResNet}"], ("body",), {"type": "SmallResNet"}),
    (["model.body={depth: 34}"], ("body", "style"), "caffe"),
    (["model.necks.1.eps=.2"], ("necks",), [{"type": "L1"}, {"type": "Smooth", "eps": 0.2}]),
    (["model.necks.0={type: Smooth, eps: 1}"], ("necks", 0), {"type": "Smooth", "eps": 1}),
    (["model.body={class_path: SmallResNet, init_args: {small: 3}}"], ("body",), {"type": "SmallResNet", "small": 3}),
    (["model.necks=[]"], ("necks",), []),
    (["model.head=null"], ("head",), None),
    (["model.body.name=None"], ("body", "name"), None),
    (["model.body.name=a=b: c: d"], ("body", "name"), "a=b: c: d"),
    (["model.body.frozen=True"], ("body", "frozen"), True),
    (["model.body.strides=(1,2)"], ("body", "strides"), [1, 2]),
    (["model.body.strides.1=3"], ("body", "strides"), [1, 3]),
    (["model.head={type: Head, _delete_: true, classes: 1}", "model.head.loss.weight=3"], ("head", "loss"),
     {"type": "L1", "weight": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("texts", "path", "value"), OVERRIDES)
def test_overrides_by_example(folder: Path, texts: list[str], path: tuple[Any, ...], value: Any) -> None:
    config = load(folder / "base" / "model.yaml")
    before = write_yaml(config.data)
    found: Any = override(config, texts, SECTIONS).data["model"]
    for key in path:
        found = found[key]
    assert found == value
    assert write_yaml(config.data) == before


def test_a_section_that_the_file_leaves_out_can_be_given_on_the_command_line() -> None:
    assert override(Config({}), ["trainer.max_epochs=3", "seed=1"], SECTIONS).data == {
        "seed": 1,
        "trainer": {"max_epochs": 3},
    }


def test_every_wrong_override_is_said_at_once(folder: Path) -> None:
    texts = [
        "model.bdoy.depth=34",
        "model.body.depht=18",
        "trainr.epochs=3",
        "model.body.depth=19",
        "=3",
        "model.head.classes=2",
    ]
    with pytest.raises(ConfigError) as caught:
        override(load(folder / "base/model.yaml"), texts, SECTIONS)
    lines = sorted(line.partition(":")[0] for line in str(caught.value).splitlines())
    assert lines == ["got '=3', expected a value for a path, as in model.backbone.depth=34", *sorted(
        ["model.bdoy", "model.body.depht", "model.body.depth", "trainr"]
    )]  # fmt: skip


def test_keys_of_another_system_are_answered_with_what_is_written_here() -> None:
    sections = {**SECTIONS, "work_dir": Foreign("--out DIR"), "resume": Foreign("--resume", lambda value: not value)}
    config = Config({"work_dir": "x", "resume": False})
    with pytest.raises(
        ConfigError, match=r"^work_dir: a key of MMPretrain; here: --out DIR \(widefield config convert .*\)$"
    ):
        check_config(config, sections)
    check_config(Config({"resume": False}), sections)
    assert override(Config({}), ["resume=false"], sections).data == {"resume": False}
    with pytest.raises(ConfigError, match="resume: a key of MMPretrain; here: --resume"):
        override(Config({}), ["resume=true"], sections)


@pytest.mark.parametrize("text", ["model.body.depth", "=3", "model..depth=3"])
def test_what_is_no_override_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a value for a path"):
        override(Config({}), [text], SECTIONS)
