"""Python objects by name, the files in which users define their own, and what was meant by a name that does not exist."""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

_SHOWN = 40


def import_object(target: str) -> Any:
    """Return the object that `target` names: `package.module:Name.attribute`, or the same with dots alone.

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
    """Import the module `place`, or the file if it ends in `.py`; what is loaded already is not run again.

    Modules are also looked for in the working directory. A file of a package is imported as its module, so that relative imports
    work; one of no package may import its neighbours. Where they were found stays on the path of imports.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: There is no such module, or running it fails.
    """
    place = absolute_place(place, Path.cwd())
    if not place.endswith(".py"):
        _search_in(Path.cwd())
        return _imported(place)
    path = Path(place)
    if not path.is_file():
        near = suggestion(path.name, (other.name for other in path.parent.glob("*.py")))
        raise FileNotFoundError(f"there is no file {place}; {near}")
    name, root = _module_of(path)
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    _search_in(root)
    if root == path.parent and path.name != "__init__.py":
        return _run(path)
    found = _imported(name)
    if found.__file__ != str(path):
        raise ValueError(f"{path} cannot be imported as {name}, which is {found.__file__} already; rename its package")
    return found


def absolute_place(place: str, folder: Path) -> str:
    """Return a module or file, given from within `folder`, so that it can be imported from anywhere.

    That is the file, or the file of a module if it lies below `folder`; other modules stay as they are.
    """
    if place.endswith(".py"):
        return str((folder / place).resolve())
    below = folder.joinpath(*place.split("."))
    for file in (below / "__init__.py", below.with_name(f"{below.name}.py")):
        if file.is_file() and _module_of(file.resolve())[0] == place:
            return str(file.resolve())
    return place


def _module_of(path: Path) -> tuple[str, Path]:
    """Return the name of the module in a file, and the folder from which it has this name."""
    parts = [] if path.name == "__init__.py" else [path.stem]
    folder = path.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts), folder


def _search_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name + ".").startswith(error.name + "."):
            raise ValueError(f"there is no module {name!r}; for a file, give its path with .py") from error
        raise ValueError(f"{name} cannot be imported: {error}") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    hidden = sys.modules.setdefault(path.stem, module) is not module  # dataclasses and pickle look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if not hidden:
            del sys.modules[path.stem]
        raise ValueError(
            f"{path} cannot be run: {type(error).__name__}: {error}; `python {path}` shows where"
        ) from error
    return module


def near_names(name: str, choices: Iterable[str]) -> list[str]:
    """Return the names among `choices` that `name` may be a slip of, the nearest first; case counts for nothing."""
    spellings: dict[str, list[str]] = {}
    for choice in choices:
        spellings.setdefault(choice.lower(), []).append(choice)
    given = name.lower()
    near = difflib.get_close_matches(given, spellings, n=3, cutoff=0.65)
    begun = [
        one
        for one in spellings
        if one and (given.startswith(one) or one.startswith(given)) and min(len(given), len(one)) > 2
    ]
    return [choice for one in dict.fromkeys([*near, *begun]) for choice in spellings[one]][:3]


def suggestion(name: str, choices: Iterable[str]) -> str:
    """Return a clause for an error message: the near names among `choices`, or all of them where none is near."""
    choices = sorted(choices)
    near = near_names(name, choices)
    if near:
        return f"did you mean {' or '.join(near)}?"
    more = f" and {len(choices) - _SHOWN} more" if len(choices) > _SHOWN else ""
    return f"there are {', '.join(choices[:_SHOWN]) or 'none'}{more}"
