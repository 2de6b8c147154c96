"""The index of components is what the components are."""

import inspect
import json
import subprocess
import sys

import pytest
from torch import nn

import widefield.components
from widefield.registry import COMPONENTS, MODELS, arguments_of

REGISTERED = """
import importlib, json, pkgutil
import widefield.components
from widefield.registry import MODELS
for module in pkgutil.walk_packages(widefield.components.__path__, "widefield.components."):
    importlib.import_module(module.name)
print(json.dumps({name: held.entry.target for name, held in MODELS._registered.items()}))
"""


def registered() -> dict[str, str]:
    """Names of all components that our files register, and where they are, found by importing every file."""
    # In a process of its own: other tests replace components.
    result = subprocess.run([sys.executable, "-c", REGISTERED], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_the_index_has_every_registered_component_and_no_other() -> None:
    assert {entry.name: entry.target for entry in COMPONENTS} == registered()


@pytest.mark.parametrize("entry", COMPONENTS, ids=lambda entry: entry.name)
def test_an_entry_says_what_the_component_says_of_itself(entry) -> None:
    component = MODELS.get(entry.name)
    assert isinstance(component, type)
    assert issubclass(component, nn.Module)
    assert entry.kind == component.component_kind
    assert entry.summary == (inspect.getdoc(component) or "").partition("\n")[0]
    assert entry.target.split(".")[2] == {"loss": "losses"}.get(entry.kind, f"{entry.kind}s")
    assert not arguments_of(component).open, "every argument can be checked"


def test_names_of_the_package_load_their_part_on_first_use() -> None:
    assert {entry.name for entry in COMPONENTS} < set(dir(widefield.components))
    assert all(getattr(widefield.components, name) is not None for name in widefield.components.__all__)
    assert widefield.components.ResNet is MODELS.get("ResNet")
    with pytest.raises(AttributeError, match="ResNet_CIFAR"):
        _ = widefield.components.nothing
    code = "import sys, widefield.components; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_getting_one_component_imports_only_its_part() -> None:
    code = (
        "import sys; from widefield.registry import MODELS; MODELS.get('CrossEntropyLoss')\n"
        "print([name for name in sys.modules if name.startswith('widefield.components.backbones')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
