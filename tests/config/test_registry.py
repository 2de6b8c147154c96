"""Components by name."""

import functools
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from widefield.registry import (
    MODELS,
    DuplicateNameError,
    Entry,
    Registry,
    UnknownNameError,
    absolute_place,
    arguments_of,
    import_module_or_file,
    import_object,
)


class Part:
    """A part.

    More of it.
    """

    def __init__(self, size: int = 1, **options: Any) -> None:
        self.size, self.options = size, options


class Strict(Part):
    component_kind = "neck"

    def __init__(self, name: str, size: int = 2) -> None:
        super().__init__(size)
        self.name = name


@pytest.fixture
def parts() -> Registry:
    parts = Registry("part", lambda: [Entry("Counter", "collections:Counter", "tool", "Counts.")])
    parts.register_module()(Part)
    parts.register_module(module=Strict, name=["Strict", "Tight"], aliases="Narrow")
    return parts


def test_a_class_is_registered_by_its_name_by_aliases_and_by_a_call(parts: Registry) -> None:
    assert parts.get("Part") is Part
    assert parts.get("Strict") is parts.get("Tight") is parts.get("Narrow") is Strict
    assert parts.names() == ["Counter", "Narrow", "Part", "Strict", "Tight"]
    assert parts.names("neck") == ["Narrow", "Strict", "Tight"]
    assert [entry.summary for entry in parts.entries("part")] == ["A part."]
    assert "Part" in parts
    assert "Parts" not in parts


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*", ["Counter", "Narrow", "Part", "Strict", "Tight"]),
        ("t*", ["Tight"]),
        ("IGHT", ["Tight"]),
        ("?a*", ["Narrow", "Part"]),
        ("nothing", []),
    ],
)
def test_entries_are_found_by_wildcards_or_a_part_of_the_name(parts: Registry, pattern: str, names: list[str]) -> None:
    assert [entry.name for entry in parts.entries(pattern)] == names


def test_functions_and_partials_are_components_too(parts: Registry) -> None:
    half = functools.partial(Part, size=5)
    parts.register_module(name="Half", module=half)
    assert parts.build({"type": "Half", "other": 1}).size == 5
    with pytest.raises(TypeError, match="has no name of its own; give one with name="):
        parts.register_module(module=half)

    @parts.register_module()
    def make(size: int) -> Part:
        """Make one."""
        return Part(size)

    assert parts.build({"type": "make", "size": 6}).size == 6
    assert make(7).size == 7
    assert [entry.summary for entry in parts.entries("make")] == ["Make one."]


def test_an_unknown_name_says_what_is_near_or_what_there_is(parts: Registry) -> None:
    with pytest.raises(UnknownNameError, match=r"^no part named 'strikt'; did you mean Strict\?$"):
        parts.get("strikt")
    with pytest.raises(UnknownNameError, match=r"there are Counter, Narrow, Part, Strict, Tight$"):
        parts.get("xyz")
    with pytest.raises(KeyError):
        parts.get("xyz")
    with pytest.raises(UnknownNameError, match=r"there are Narrow, Strict, Tight$"):
        parts.get("xyz", kind="neck")


def test_a_duplicate_name_says_who_holds_it_and_force_replaces(parts: Registry) -> None:
    with pytest.raises(
        DuplicateNameError, match=r"'Part' exists already: .*:Part \(.*test_registry.py:\d+\).*force=True"
    ):
        parts.register_module(name="Part", module=Strict)
    with pytest.raises(DuplicateNameError, match="collections:Counter"):
        parts.register_module(name=["New", "Counter"], module=Strict)
    assert "New" not in parts
    parts.register_module(name="Part", module=Strict, force=True)
    assert parts.get("Part") is Strict


def test_a_definition_that_is_run_again_replaces_itself_but_another_of_its_name_does_not() -> None:
    parts = Registry("part")
    source = "@parts.register_module()\nclass Same: ...\n"
    code = compile(source, "same.py", "exec")
    exec(code, {"parts": parts, "__name__": "same"})
    first = parts.get("Same")
    exec(code, {"parts": parts, "__name__": "same"})
    assert parts.get("Same") is not first
    with pytest.raises(DuplicateNameError, match=r"same\.py:1"):
        exec(compile("\n\n" + source, "same.py", "exec"), {"parts": parts, "__name__": "same"})


def test_a_replaced_component_of_the_index_stays_replaced_when_its_module_is_imported() -> None:
    parts = Registry("part", lambda: [Entry("Part", f"{Part.__module__}:Part")])
    parts.register_module(name="Part", module=Strict, force=True)
    parts.register_module(module=Part)
    assert parts.get("Part") is Strict


@pytest.mark.parametrize("imported", [False, True])
def test_a_component_that_tutorials_have_users_write_gives_way_to_theirs(
    imported: bool, caplog: pytest.LogCaptureFixture
) -> None:
    parts = Registry("part", lambda: [Entry("Part", f"{Part.__module__}:Part", replaceable=True)])
    if imported:
        parts.register_module(module=Part, replaceable=True)
    parts.register_module(name="Part", module=Strict)
    parts.register_module(module=Part)
    assert parts.get("Part") is Strict
    assert f"takes the place of {Part.__module__}:Part" in caplog.text
    with pytest.raises(DuplicateNameError, match="Strict"):
        parts.register_module(name="Part", module=Above)


@pytest.mark.parametrize(
    ("register", "message"),
    [
        (lambda parts: parts.register_module(Part), "parentheses"),
        (lambda parts: parts.register_module(module=3), "no class or function"),
        (lambda parts: parts.register_module(name=[3]), "name must be a text"),
    ],
)
def test_a_wrong_registration_is_refused(parts: Registry, register: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        register(parts)


def test_build_takes_descriptions_classes_import_paths_and_what_is_built(parts: Registry) -> None:
    assert parts.build({"type": "Part", "size": 3}).size == 3
    assert parts.build({"type": Part}, size=4).size == 4
    assert parts.build({"type": "Part", "size": 5}, size=4).size == 5
    assert parts.build({"type": "collections.OrderedDict"}) == {}
    assert parts.build({"class_path": "Part", "init_args": {"size": 6}}).size == 6
    part = Part()
    assert parts.build(part) is part
    description = {"type": "Part", "size": 3}
    parts.build(description)
    assert description == {"type": "Part", "size": 3}


@pytest.mark.parametrize(
    ("description", "error", "message"),
    [
        ("Part", TypeError, "described by a dictionary"),
        (None, TypeError, "not by None"),
        ([{"type": "Part"}], TypeError, "described by a dictionary"),
        ({"size": 3}, TypeError, "no type among size"),
        ({"type": 3}, TypeError, "type is 3"),
        ({"type": "Strict", "name": "x", "sise": 3}, TypeError, r"Strict has no argument 'sise'; did you mean size\?"),
        ({"type": "Strict"}, TypeError, "Strict needs name"),
        ({"type": "Part_"}, UnknownNameError, "did you mean Part"),
        ({"type": "collections.Nothing"}, UnknownNameError, "collections has no 'Nothing'"),
        ({"type": "no_such_package.Thing"}, UnknownNameError, "no module 'no_such_package'"),
        ({"type": "math.pi"}, UnknownNameError, "is a float"),
    ],
)
def test_a_wrong_description_is_refused(
    parts: Registry, description: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parts.build(description)


def test_a_list_makes_a_sequence_where_the_registry_says_of_what() -> None:
    assert len(MODELS.build([{"type": "torch.nn.ReLU"}, {"type": "torch.nn.Tanh"}])) == 2


class _Point:
    def __init__(self, name: str, value: str, package: str) -> None:
        self.name, self.value, self.dist = name, value, type("Dist", (), {"name": package})


def test_installed_packages_bring_components_that_are_imported_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        _Point("Fraction", "fractions:Fraction", "maths"),
        _Point("Both", "fractions:Fraction", "maths"),
        _Point("Both", "decimal:Decimal", "money"),
        _Point("Gone", "no_such_package:Gone", "broken"),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "parts" else [])
    parts = Registry("part", group="parts")
    assert [(entry.name, entry.summary) for entry in parts.entries("frac")] == [("Fraction", "from maths")]
    assert parts.build({"type": "Fraction", "numerator": 3}) == 3
    with pytest.raises(DuplicateNameError, match=r"fractions:Fraction \(from maths\), decimal:Decimal \(from money\)"):
        parts.get("Both")
    with pytest.raises(UnknownNameError, match="no_such_package"):
        parts.get("Gone")
    with pytest.raises(DuplicateNameError, match="from maths"):
        parts.register_module(name="Fraction", module=Part)


class Above:
    def __init__(self, depth: int, width: int = 1, *, flag: bool = False, late: "Undefined" = None) -> None: ...  # noqa: F821


class HandsOn(Above):
    def __init__(self, extra: str, depth: int, **kwargs: Any) -> None:
        super().__init__(depth, flag=True, **kwargs)


class OldStyle(HandsOn):
    def __init__(self, **options: Any) -> None:
        super(OldStyle, self).__init__(**options)  # noqa: UP008


class Elsewhere(Above):
    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(3)
        dict(**kwargs)


class MadeByNew(int):
    def __new__(cls, start: int = 0) -> "MadeByNew":
        return super().__new__(cls, start)


class Inherits(HandsOn):
    pass


class PassesAll(HandsOn):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Pops(Above):
    def __init__(self, **kwargs: Any) -> None:
        self.colour = kwargs.pop("colour", "red")
        self.size = kwargs.pop("size")
        kwargs.setdefault("depth", 5)
        super().__init__(**kwargs)


class Sets(Above):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "depth" not in kwargs:
            kwargs["depth"] = 7
        Above.__init__(self, *args, flag=True, **kwargs)


class PopsWhatTheBaseHas(Above):
    def __init__(self, **kwargs: Any) -> None:
        width = kwargs.pop("width", 8)
        super().__init__(width=width, **kwargs)


class Swallows(Above):
    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(3)


_WITHOUT_SOURCE: dict[str, Any] = {"Above": Above}
exec(
    "class NoSource(Above):\n"
    "    def __init__(self, extra, **kwargs):\n"
    "        self.own = kwargs.pop('own', 1)\n"
    "        super().__init__(3, **kwargs)\n",
    _WITHOUT_SOURCE,
)


@pytest.mark.parametrize(
    ("component", "names", "is_open"),
    [
        (Above, ["depth", "width", "flag", "late"], False),
        (HandsOn, ["extra", "depth", "width", "late"], False),
        (OldStyle, ["extra", "depth", "width", "late"], False),
        (Inherits, ["extra", "depth", "width", "late"], False),
        (PassesAll, ["extra", "depth", "width", "late"], False),
        (Pops, ["size", "colour", "depth", "width", "flag", "late"], False),
        (Sets, ["depth", "width", "late"], False),
        (PopsWhatTheBaseHas, ["depth", "width", "flag", "late"], False),
        (Swallows, ["name"], True),
        (_WITHOUT_SOURCE["NoSource"], ["extra"], True),
        (Elsewhere, ["name"], True),
        (Strict, ["name", "size"], False),
        (Part, ["size"], True),
        (lambda a, b=1: None, ["a", "b"], False),
        (lambda a, **rest: None, ["a"], True),
        (object, [], False),
        (MadeByNew, ["start"], False),
    ],
)
def test_arguments_are_followed_through_kwargs(component: Any, names: list[str], is_open: bool) -> None:
    found = arguments_of(component)
    assert list(found.named) == names
    assert found.open is is_open


def test_arguments_that_a_constructor_pops_or_sets_have_the_defaults_written_there() -> None:
    pops = arguments_of(Pops).named
    assert pops["size"].required
    assert [pops[name].default for name in ("colour", "depth")] == ["red", 5]
    assert arguments_of(Sets).named["depth"].default == 7
    assert arguments_of(PopsWhatTheBaseHas).named["width"].default == 8


def test_components_of_their_idioms_are_built_and_their_slips_refused(parts: Registry) -> None:
    for component in (PassesAll, Pops, Sets, _WITHOUT_SOURCE["NoSource"]):
        parts.register_module(module=component)
    assert parts.build({"type": "Pops", "size": 2, "width": 3}).colour == "red"
    assert parts.build({"type": "NoSource", "extra": 1, "own": 2, "width": 3}).own == 2
    assert isinstance(parts.build({"type": "PassesAll"}, default_args={"extra": "x", "depth": 1}), PassesAll)
    assert parts.build({"type": "Part", "size": 5}, default_args={"size": 4}).size == 5
    for wrong in ({"type": "Pops", "size": 2, "colur": "x"}, {"type": "Sets", "flag": True}, {"type": "PassesAll"}):
        with pytest.raises(TypeError, match=r"did you mean colour|has no argument 'flag'|needs extra, depth"):
            parts.build(wrong)


def test_arguments_know_type_default_and_the_class_that_describes_them() -> None:
    width, late = (arguments_of(HandsOn).named[name] for name in ("width", "late"))
    assert (width.annotation, width.default, width.owner, width.required) == (int, 1, Above, False)
    assert late.annotation is Any
    assert arguments_of(HandsOn).named["depth"].required


def test_a_file_is_run_once_and_one_that_fails_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "my_parts_for_a_test.py"
    path.write_text("import neighbour_for_a_test\nfound = []\n")
    (tmp_path / "neighbour_for_a_test.py").write_text("")
    assert import_module_or_file(str(path)) is import_module_or_file(str(path))
    broken = tmp_path / "my_broken_parts.py"
    broken.write_text("1 / 0")
    with pytest.raises(ValueError, match=r"my_broken_parts\.py cannot be run: ZeroDivisionError"):
        import_module_or_file(str(broken))
    assert "my_broken_parts" not in sys.modules
    with pytest.raises(FileNotFoundError, match=r"did you mean my_broken_parts\.py"):
        import_module_or_file(str(tmp_path / "my_broken_part.py"))
    with pytest.raises(ValueError, match="no module 'no_such_module'"):
        import_module_or_file("no_such_module")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of a user's, in a folder that is not on the path of imports."""
    folder = tmp_path / "users_package"
    (folder / "inside").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "layers.py").write_text("WIDTH = 3")
    (folder / "models.py").write_text("from .layers import WIDTH\nfrom users_package import layers\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("place", "cwd"),
    [
        ("users_package.models", "."),
        ("users_package/models.py", "."),
        ("models.py", "users_package"),
        ("../models.py", "users_package/inside"),
    ],
)
def test_a_module_of_a_package_is_one_however_it_is_named(
    package: Path, monkeypatch: pytest.MonkeyPatch, place: str, cwd: str
) -> None:
    monkeypatch.chdir(package.parent / cwd)
    module = import_module_or_file(place)
    assert module.__name__ == "users_package.models"
    assert module.layers.WIDTH == module.WIDTH == 3
    assert absolute_place(place, Path.cwd()) == str(package / "models.py")
    monkeypatch.chdir("/")
    assert import_module_or_file(str(package / "models.py")) is module


def test_packages_and_modules_without_one_are_found_in_the_working_directory(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(package.parent)
    assert import_module_or_file("users_package").__file__ == str(package / "__init__.py")
    (package / "__init__.py").unlink()
    del sys.modules["users_package"]
    assert absolute_place("users_package.layers", Path.cwd()) == "users_package.layers"  # its package has no file
    assert import_module_or_file("users_package.layers").WIDTH == 3
    assert absolute_place("torch.nn", Path.cwd()) == "torch.nn"


def test_a_file_may_import_its_neighbours_whenever_it_wants_to(package: Path) -> None:
    (package / "__init__.py").unlink()
    file = package / "users_file.py"
    file.write_text("def width():\n    from layers import WIDTH\n    return WIDTH\n")
    assert import_module_or_file(str(file)).width() == 3
    del sys.modules["users_file"]
    file.write_text("from .layers import WIDTH")
    with pytest.raises(ValueError, match=r"users_file\.py cannot be run: ImportError: attempted relative import"):
        import_module_or_file(str(file))


def test_a_package_with_the_name_of_a_loaded_module_is_refused(package: Path) -> None:
    taken = package.rename(package.with_name("fractions"))
    with pytest.raises(ValueError, match=r"cannot be imported as fractions, which is .* already; rename its package"):
        import_module_or_file(str(taken / "__init__.py"))


def test_objects_are_imported_by_dots_and_colons() -> None:
    assert import_object("os.path.join") is import_object("os.path:join")
    assert import_object("collections:OrderedDict.fromkeys")([1]) == {1: None}


def test_the_registry_and_the_list_of_its_names_import_nothing_heavy() -> None:
    code = (
        "import sys; from widefield.registry import MODELS; MODELS.entries('*'); import widefield.config\n"
        "print({'torch', 'lightning', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "set()"
