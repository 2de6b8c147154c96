"""Lightning's way to describe a component, read as ours."""

from typing import Any

from widefield.config.config import Config, Path, dotted
from widefield.config.expected import written
from widefield.config.merge import DELETE


def with_types(config: Config) -> Config:
    """`{class_path: X, init_args: {...}}` written as `{type: X, ...}`, throughout.

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
        raise config.error(
            [(path, f"{', '.join(map(str, others))} beside class_path; arguments stand under init_args")]
        )
    typed: dict[Any, Any] = {"type": value.pop("class_path")} if "class_path" in value else {}
    for key, item in value.items():
        if key == DELETE:
            typed[key] = item
        elif isinstance(item, dict):
            typed |= item
        elif item is not None:
            raise config.error([((*path, key), f"got {written(item)}, expected the arguments of {dotted(path)}")])
    return typed
