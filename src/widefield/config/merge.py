"""Configurations laid over each other, and descriptions in Lightning's form turned into ours."""

from typing import Any

from widefield.config.check import written
from widefield.config.config import Config, Path, dotted

DELETE = "_delete_"
IMPORTS = "imports"
_ABSENT = object()


def merge(base: Config, child: Config) -> Config:
    """`child` over `base`.

    Dictionaries merge key by key; everything else replaces. A dictionary takes nothing from the base where it says
    `_delete_: true`, or where it names another `type`: the arguments of the old type mean nothing to the new one. Over a list, a
    dictionary whose keys are indices changes these items alone. The files under `imports` add up.

    Raises:
        ConfigError: A dictionary over something else, or an index that the list does not have.
    """
    replaced: set[Path] = set()
    merged = _merge(base.data, child.data, (), child, replaced)
    imports = [*(base.data.get(IMPORTS) or ()), *(child.data.get(IMPORTS) or ())]
    if imports:
        merged[IMPORTS] = list(dict.fromkeys(imports))
    kept = {
        path: origin
        for path, origin in base.origins.items()
        if not any(path[:end] in replaced for end in range(1, len(path) + 1))
    }
    return Config(merged, {**kept, **child.origins})


def clashes(first: Any, second: Any, path: Path = ()) -> list[Path]:
    """Paths at which two configurations, neither above the other, say different things."""
    if isinstance(first, dict) and isinstance(second, dict):
        shared = [key for key in first if key in second and not (path == () and key == IMPORTS)]
        return [clash for key in shared for clash in clashes(first[key], second[key], (*path, str(key)))]
    return [] if first == second and type(first) is type(second) else [path]


def settles(data: Any, path: Path) -> bool:
    """Return True if `data`, laid over a configuration, decides the value at `path`."""
    for key in path:
        if not isinstance(data, dict) or data.get(DELETE):
            return True
        if key not in data:
            return False
        data = data[key]
    return True


def _merge(base: Any, child: Any, path: Path, whole: Config, replaced: set[Path]) -> Any:
    """`child` over `base`; paths at which nothing is left of the base are added to `replaced`."""
    if not isinstance(child, dict):
        replaced.add(path)
        return child
    retyped = isinstance(base, dict) and "type" in base and child.get("type", base["type"]) != base["type"]
    if child.get(DELETE) or base is _ABSENT or base is None or retyped:
        replaced.add(path)
        base = {}
    if isinstance(base, list):
        return _merge_items(base, child, path, whole, replaced)
    if not isinstance(base, dict):
        advice = f"write {DELETE}: true into the dictionary if it shall replace this value"
        raise whole.error((path, f"a dictionary over {written(base)}; {advice}"))
    merged = dict(base)
    for key, value in child.items():
        if key != DELETE:
            merged[key] = _merge(base.get(key, _ABSENT), value, (*path, str(key)), whole, replaced)
    return merged


def _merge_items(base: list[Any], child: dict[Any, Any], path: Path, whole: Config, replaced: set[Path]) -> list[Any]:
    merged = list(base)
    for key, value in child.items():
        here = (*path, str(key))
        if not str(key).isdecimal():
            advice = f"give indices as keys, a list, or {DELETE}: true"
            raise whole.error((here, f"the value is a list of {len(base)}; {advice}"))
        if int(key) >= len(base):
            raise whole.error((here, f"there is no item {key} in a list of {len(base)}; the first item is 0"))
        merged[int(key)] = _merge(base[int(key)], value, here, whole, replaced)
    return merged


def with_types(config: Config) -> Config:
    """Return `config` with every `{class_path: X, init_args: {...}}` written as `{type: X, ...}`.

    Raises:
        ConfigError: There are other keys beside these.
    """
    origins = {}
    for path, origin in config.origins.items():
        keys = ("type" if key == "class_path" else key for key in path if key not in ("init_args", "dict_kwargs"))
        origins[tuple(keys)] = origin
    return Config(_typed(config.data, (), config), origins)


def _typed(value: Any, path: Path, config: Config) -> Any:
    if isinstance(value, list):
        return [_typed(item, (*path, str(k)), config) for k, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    value = {key: _typed(item, (*path, str(key)), config) for key, item in value.items()}
    if not {"class_path", "init_args"} & set(value):
        return value
    others = set(value) - {"class_path", "init_args", "dict_kwargs", DELETE}
    if others:
        names = ", ".join(map(str, others))
        raise config.error((path, f"{names} beside class_path; arguments stand under init_args"))
    typed: dict[Any, Any] = {"type": value.pop("class_path")} if "class_path" in value else {}
    for key, item in value.items():
        if key == DELETE:
            typed[key] = item
        elif isinstance(item, dict):
            typed |= item
        elif item is not None:
            raise config.error(((*path, key), f"got {written(item)}, expected the arguments of {dotted(path)}"))
    return typed
