"""`import widefield` is light, shows few names, and its errors have one root. `lint-imports` checks that imports point one way."""

import ast
import builtins
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from widefield.registry import registered_in

SOURCE = Path(importlib.util.find_spec("widefield").origin).parent
LOADED = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("widefield", {"torch", "lightning", "numpy", "pyvips"}), ("widefield.images", {"torch", "lightning"})],
)
def test_importing_a_part_loads_only_what_it_needs(module, unwanted):
    result = subprocess.run([sys.executable, "-c", LOADED, module], check=True, capture_output=True, text=True)
    assert not unwanted & set(result.stdout.split())


def test_few_names_are_shown_and_others_can_be_imported():
    import widefield

    assert dir(widefield) == widefield.__all__
    assert len(widefield.__all__) <= 16
    assert widefield.open_image is importlib.import_module("widefield.images").open_image
    assert widefield.METHODS is importlib.import_module("widefield.pretraining").METHODS
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'; it has .*open_image"):
        _ = widefield.nothing


def test_a_room_is_there_without_an_import_of_its_own():
    program = "import widefield; print(widefield.images.foreground.__name__, widefield.registry.Registry.__name__)"
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["foreground", "Registry"]


@pytest.mark.parametrize("stub", sorted(SOURCE.rglob("__init__.pyi")), ids=lambda stub: stub.parent.name)
def test_every_name_of_a_stub_is_where_the_stub_says(stub):
    tree = ast.parse(stub.read_text(encoding="utf-8"))
    homes = [(line.module, name.name) for line in tree.body if isinstance(line, ast.ImportFrom) for name in line.names]
    for module, name in homes:
        if module.startswith("widefield"):
            path = SOURCE.joinpath(*module.split(".")[1:])
            files = [path.with_suffix(".py"), path / "__init__.pyi", path / "__init__.py"]
            text = next(file for file in files if file.is_file()).read_text(encoding="utf-8")
            assert name == "*" or re.search(rf"\b{name}\b", text), f"{name} is not in {module}"
            hidden = module != "widefield" and (stub.parent / f"{name}.py").exists()
            assert not hidden, (
                f"{name} is a file beside the stub, too, which is found in its place once it was imported"
            )


STUB = SOURCE / "components" / "__init__.pyi"


def stub() -> str:
    """The stub of components with a line for each file that has one; run this file to write it."""
    named = [line for line in STUB.read_text(encoding="utf-8").splitlines() if not line.endswith(" *")]
    files = {entry.target.partition(":")[0] for entry in registered_in("MODELS", "components", "modules")}
    return "".join(f"{line}\n" for line in sorted([*named, *(f"from {file} import *" for file in files)]))


def test_the_stub_of_components_has_every_file_with_one():
    assert STUB.read_text(encoding="utf-8") == stub(), "write it anew: uv run python tests/test_layers.py"


def test_every_error_of_ours_has_the_root_and_what_users_did_is_a_built_in_error_too():
    """Found in the source, so that an error in a module that nothing imports counts too."""
    kinds = {
        name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    bases = {
        node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases]
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }

    def descend(name: str) -> set[str]:
        return {name}.union(*(descend(base) for base in bases.get(name, ()) if base != name))

    errors = {name: descend(name) for name in bases if not descend(name).isdisjoint(kinds)}
    assert len(errors) > 10
    assert not [name for name, above in errors.items() if "WidefieldError" not in above]
    alone = {
        name
        for name, above in errors.items()
        if above.isdisjoint({"ValueError", "OSError", "ImportError", "MemoryError"})
    }
    of_models = {"UnsupportedOpError", "VerificationError", "PlainFailsError", "DifferentGraphError"}
    assert alone == {"WidefieldError", *of_models}


def test_the_page_on_the_engine_has_all_of_its_files():
    page = Path(__file__).parents[1] / "docs" / "engine.md"
    files = {path.name for path in (SOURCE / "streaming").glob("*.py")} - {"__init__.py"}
    assert not files - set(re.findall(r"`(\w+\.py)`", page.read_text(encoding="utf-8")))


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
