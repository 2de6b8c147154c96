"""Python objects by name, and the files in which users define their own."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from widefield.registry.near import suggestion


def import_object(target: str) -> Any:
    """The object that `target` names: `package.module:Name.attribute`, or the same with dots alone.

    Raises:
        ValueError: There is no such module, or no such name in it.
    """
    place, colon, name = target.partition(":")
    parts = name.split(".") if colon else []
    while True:
        try:
            found: Any = importlib.import_module(place)
            break
        except ModuleNotFoundError as error:
            if not error.name or not (place + ".").startswith(error.name + "."):
                raise  # the module is there; something that it imports is not
            shorter, dot, last = place.rpartition(".")
            if colon or not dot:
                raise ValueError(f"{target!r} cannot be imported: there is no module {error.name!r}") from None
            place, parts = shorter, [last, *parts]
    for part in parts:
        if not hasattr(found, part):
            known = [known for known in dir(found) if not known.startswith("_")]
            raise ValueError(f"{place} has no {part!r}; {suggestion(part, known)}")
        found = getattr(found, part)
    return found


def import_module_or_file(place: str) -> ModuleType:
    """Import the module `place`, or the file if it ends in `.py`; a file that is loaded already is not run again.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no such module, or running it fails.
    """
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name and (place + ".").startswith(error.name + "."):
                raise ValueError(f"there is no module {place!r}; for a file, give its path with .py") from error
            raise ValueError(f"{place} cannot be imported: {error}") from error
    path = Path(place).resolve()
    if not path.is_file():
        near = suggestion(path.name, (other.name for other in path.parent.glob("*.py")))
        raise FileNotFoundError(f"there is no file {place}; {near}")
    return _loaded(path) or _run(path)


def _loaded(path: Path) -> ModuleType | None:
    module = sys.modules.get(path.stem)
    return module if module is not None and getattr(module, "__file__", None) == str(path) else None


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    hidden = sys.modules.setdefault(path.stem, module) is not module  # dataclasses and pickle look their module up
    sys.path.insert(0, str(path.parent))  # the file may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if not hidden:
            del sys.modules[path.stem]
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module
