"""The index of components is what the components are."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import widefield.components
from widefield.components.metrics import METRICS
from widefield.pretraining import METHODS
from widefield.registry import DATASETS, MODELS, TRANSFORMS, Entry, arguments_of, index, registered_in

PARTS = '''"""Parts."""

import base


class Plane(base.Base):
    """Not registered."""


@PARTS.register_module(replaceable=True)
class Saw(Plane):
    """Cuts.

    More of it.
    """

    def cut(self):
        class Inside: ...


# A comment above a decorator, and one empty line before it.

@PARTS.register_module(kind="glue")
def paste():
    """Holds."""


@OTHERS.register_module()
class Other(Plane):
    """Of another registry."""


@PARTS.register_module(["hammer", "mallet"], aliases="maul", kind="heavy")
class Hammer(Plane):
    """Hits."""

    @property
    def weight(self):
        return 1
'''

REGISTRIES = {"MODELS": MODELS, "DATASETS": DATASETS, "TRANSFORMS": TRANSFORMS, "METRICS": METRICS, "METHODS": METHODS}
IMPORTED = """
import dataclasses, importlib, json, pkgutil, sys
import widefield.components
facts = {"package imports torch": "torch" in sys.modules}
from widefield.registry import DATASETS, MODELS, TRANSFORMS
MODELS.get("CrossEntropyLoss")
facts["backbones of a loss"] = [name for name in sys.modules if name.startswith("widefield.components.backbones")]
import widefield.data, widefield.modules, widefield.pretraining.methods
for package in (widefield.components, widefield.data, widefield.modules, widefield.pretraining.methods):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
from widefield.components.metrics import METRICS
from widefield.pretraining import METHODS
facts["registered"] = {
    registry: [dataclasses.asdict(held.entry) for held in globals()[registry]._registered.values()]
    for registry in ("MODELS", "DATASETS", "TRANSFORMS", "METRICS", "METHODS")
}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What imports load and register in a process of its own: in this one other tests have imported, and replaced, components."""
    result = subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True)
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def test_the_index_read_from_the_source_is_what_importing_the_source_registers(imported: dict[str, Any]) -> None:
    for name, registered in imported["registered"].items():
        index = [entry for entry in REGISTRIES[name].index.values() if entry.target.startswith("widefield.")]
        assert sorted(map(str, index)) == sorted(str(Entry(**entry)) for entry in registered)


def test_decorators_are_read_with_all_that_they_say_below_a_comment_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_PACKAGE", tmp_path)
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "base.py").write_text('class Base:\n    """A base."""\n\n    component_kind = "tool"\n')
    (tmp_path / "room" / "parts.py").write_text(PARTS)
    assert registered_in("PARTS", "room") == [
        Entry("Saw", "widefield.room.parts:Saw", "tool", "Cuts.", replaceable=True),
        Entry("paste", "widefield.room.parts:paste", "glue", "Holds."),
        Entry("hammer", "widefield.room.parts:Hammer", "heavy", "Hits."),
        Entry("mallet", "widefield.room.parts:Hammer", "heavy", "another name of hammer"),
        Entry("maul", "widefield.room.parts:Hammer", "heavy", "another name of hammer"),
    ]


@pytest.mark.parametrize("entry", MODELS.index.values(), ids=lambda entry: entry.name)
def test_a_component_is_a_module_in_the_folder_of_its_kind(entry) -> None:
    component = MODELS.get(entry.name)
    assert isinstance(component, type)
    assert issubclass(component, nn.Module)
    if entry.target.startswith("widefield.modules.dense_components:"):
        return  # Lightning modules of components, which refuse options that they do not know when they are made
    assert entry.target.split(".")[2] == {"loss": "losses"}.get(entry.kind, f"{entry.kind}s")
    assert not arguments_of(component).open, "every argument can be checked"


def test_names_of_the_package_load_their_part_on_first_use(imported: dict[str, Any]) -> None:
    assert set(MODELS.index) < set(dir(widefield.components))
    assert all(getattr(widefield.components, name) is not None for name in widefield.components.__all__)
    assert widefield.components.ResNet is MODELS.get("ResNet")
    with pytest.raises(AttributeError, match="ResNet_CIFAR"):
        _ = widefield.components.nothing
    assert not imported["package imports torch"]


def test_getting_one_component_imports_only_its_part(imported: dict[str, Any]) -> None:
    assert imported["backbones of a loss"] == []
