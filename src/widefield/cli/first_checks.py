"""Checks of a verb before torch is imported, which takes seconds: paths, and how arguments are spelt."""

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from widefield.config.load import parse_value
from widefield.inference.names import LAST, is_mentioned, model_names
from widefield.pretraining.arguments import parse
from widefield.pretraining.out import OutFolder, check_file
from widefield.pretraining.settings import Errors
from widefield.pretraining.settings import arguments as checked_arguments
from widefield.registry import OutlineError, arguments_of, outline, suggestion

_FUNCTIONS = {
    "pretrain": "widefield.pretraining.training:train",
    "export": "widefield.pretraining.checkpoint:export",
    "embed": "widefield.pretraining.embed_images:embed",
    "embed --patches": "widefield.inference.patch_features:embed_patches",
}
_MISSING = {
    "images": "the folder of images {} does not exist; check --images",
    "features": "the folder of features {} does not exist; check --features",
    "masks": "the folder of label maps {} does not exist; check --masks",
    "targets": "the folder of target maps {} does not exist; check --targets",
    "labels": "{} does not exist; give a label table, a CSV file with the columns image and label",
    "checkpoint": "the checkpoint {} does not exist; name a .ckpt file, or the folder of a run, with --checkpoint",
    "foreground": "the foreground {} does not exist; give auto, none, otsu, hsv, a GeoJSON file, or a folder of such files",
    "run": "there is no run in {}, which does not exist; name a folder that `widefield fit` wrote with --run",
}
"""The message about a path that is not there, by the argument."""
_EXPECTED = {
    "data": "name a folder of images, or image files, with --data",
    "checkpoint": "name a .ckpt file in the folder checkpoints of a run, or that of a run of `fit`, with --checkpoint",
}
"""The words for what was expected of the arguments of a call that name files."""
_FIT_NEEDS = {
    "images": "--images DIR, a folder of image files",
    "labels": "--labels TABLE, a CSV or Parquet file with a row per image",
    "masks": "--masks DIR, a folder of label maps",
    "model": "--model NAME, such as resnet18 or timm/convnext_tiny",
    "out": "--out DIR, a folder for the results",
}
"""Flags of `fit` without which there is nothing to train, and what they take."""
_WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors")
_NOT_ARGUMENTS = ("verbose", "imports", "verb", "chosen", "patches")


def check_paths(arguments: argparse.Namespace, others: list[str]) -> None:
    """Check that the files, folders and networks that the flags of a verb name are there.

    Raises:
        FileNotFoundError: A file or folder that is to be read does not exist.
        ValueError: There is no network of that name.
    """
    for name, message in _MISSING.items():
        given = getattr(arguments, name, None)
        paths: list[Any] = given if isinstance(given, list) else [given]
        for path in paths:
            if isinstance(path, Path) and not path.exists():
                raise FileNotFoundError(
                    f"cannot read {path}: there is no such file" if given is paths else message.format(path)
                )
    if not getattr(arguments, "imports", ()):  # they may bring networks
        models = getattr(arguments, "model", None)
        for model in models if isinstance(models, list) else [models]:
            _check_model(model)


def check_fit(arguments: argparse.Namespace, others: list[str]) -> None:
    """Check the paths of `fit`, and that what it needs is given.

    Raises:
        ValueError, OSError: As `check_paths` and `check_folder`.
    """
    check_paths(arguments, others)
    if getattr(arguments, "features", None) is not None and (arguments.images or arguments.model):
        raise ValueError("--features takes the place of --images and --model; give it alone")
    if is_missing_file(arguments.weights):
        raise FileNotFoundError(
            f"--weights: {arguments.weights} does not exist; name a file of weights, DEFAULT to download some, or leave it out"
        )
    if arguments.out is not None:
        check_folder(arguments.out, arguments.resume)
    _check_needed(arguments, others)


def _check_needed(arguments: argparse.Namespace, others: list[str]) -> None:
    """Raises ValueError for what `fit` needs and is not given, unless a configuration may hold it."""
    if arguments.config or arguments.resume or others:
        return
    maps = next((name for name in ("masks", "targets") if getattr(arguments, name) is not None), "labels")
    labels = "masks" if arguments.task == "segment" else maps
    needed = ["labels", "out"] if arguments.features is not None else ["images", labels, "model", "out"]
    if missing := [_FIT_NEEDS[name] for name in needed if getattr(arguments, name, None) is None]:
        raise ValueError(f"give {'; '.join(missing)}; or a configuration with --config FILE")


def is_missing_file(weights: Any) -> bool:
    """Return True if `weights` names a file that is not there; published weights have names without such an ending."""
    return (
        isinstance(weights, str) and weights.endswith(_WEIGHTS) and "://" not in weights and not Path(weights).is_file()
    )


def check_folder(out: Path, resume: bool) -> None:
    """Check that a run of `fit` can be written to the folder `out`.

    Raises:
        NotADirectoryError: It is a file.
        FileExistsError: It holds a run that is not to be resumed.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; name a folder with --out DIR")
    if not resume and (out / LAST).exists():
        raise FileExistsError(
            f"{out} already holds a run; continue it with --resume, or name another folder with --out DIR"
        )


def _check_model(name: Any) -> None:
    """Raises ValueError for a name with the prefix of a library in whose files it does not stand."""
    plain = str(name).removeprefix("patches:")
    prefix = str(name).removesuffix(plain)
    library, slash, network = plain.partition("/")
    if not slash or ":" in network or library not in ("timm", "torchvision"):
        return
    if not is_mentioned(library, network.partition(".")[0]):  # behind the dot stands which weights of timm
        known = [prefix + one for one in model_names()]
        raise ValueError(f"there is no model {name!r}; {suggestion(str(name), known)}")


def check_call(arguments: argparse.Namespace, others: list[str]) -> None:
    """Check the arguments of `pretrain`, `export` or `embed`: paths, names and values, those in dictionaries too.

    Raises:
        ValueError: An argument is misspelt, missing or out of range, or `out` cannot be written to.
        FileNotFoundError: A file or folder that is to be read does not exist.
    """
    given = arguments_of_call(arguments, others)
    data = given.get("data", [])
    method_args = given.get("method_args")
    method_args = method_args if isinstance(method_args, dict) else {}  # else its value is refused below
    paths_of = {
        "checkpoint": [given.get("checkpoint")],
        "method_args.teacher_weights": [method_args.get("teacher_weights")],
    }
    for name, paths in {"data": [data] if isinstance(data, str) else data, **paths_of}.items():
        for path in paths:
            if path is not None and not Path(path).expanduser().exists():
                raise FileNotFoundError(
                    f"{name}: {path} does not exist; {_EXPECTED.get(name, 'name a file of weights')}"
                )
    if not arguments.imports:  # they may bring networks
        _check_name(given.get("model"))
        _check_name(method_args.get("teacher"))
    out, overwrite = Path(given["out"]).expanduser(), bool(given.get("overwrite"))
    if not arguments.imports and not is_of_patches(arguments):  # they may bring methods
        _check_values(arguments.verb, given)
    if is_of_patches(arguments):
        if out.is_file():
            raise NotADirectoryError(f"out: {out} is a file; name a folder, in which each slide gets a file")
    elif arguments.verb == "pretrain":
        OutFolder(out.resolve()).check(overwrite, bool(given.get("resume_interrupted") or given.get("resume")))
    else:
        check_file(out, overwrite)


def _check_name(model: Any) -> None:
    """Raises ValueError for the name of a model, or of a teacher, that is none."""
    if isinstance(model, str) and ":" not in model:
        with suppress(OutlineError):
            outline("widefield.pretraining.wrapping:split_name")(model)
        _check_model(model)


def _check_values(verb: str, given: dict[str, Any]) -> None:
    """Raises ValueError for values that the function of a verb refuses, as far as outlines tell."""
    with suppress(OutlineError):  # then the function alone does
        function = outline(_FUNCTIONS[verb])
        all_given = {name: one.default for name, one in arguments_of(function).named.items()} | given
        if verb == "pretrain":
            parse(function, all_given, outline)
            return
        errors = Errors()
        checked_arguments(function, all_given, errors, unchecked=("data", "model"))
        errors.raise_if_any(f"widefield.{verb}")


def is_of_patches(arguments: argparse.Namespace) -> bool:
    """Return True of `widefield embed --patches`."""
    return bool(getattr(arguments, "patches", False))


def arguments_of_call(arguments: argparse.Namespace, others: list[str]) -> dict[str, Any]:
    """Return what the function of a verb is called with: the flags that were given, and `others`, which win.

    These are key=value, with dots for entries of dictionaries.

    Raises:
        ValueError: Something in `others` is no argument of the function, or one without a default is missing.
    """
    flags = {name: value for name, value in vars(arguments).items() if name not in _NOT_ARGUMENTS}
    given: dict[str, Any] = {}
    for name, value in flags.items():
        if value is not None and value is not False:  # 0 is a value
            _put(given, name.split("."), value, name)
    if len(given.get("data", ())) == 1:
        # A folder alone is not a list of folders: images are named by their paths in it.
        (given["data"],) = given["data"]
    known = arguments_of(outline(_FUNCTIONS[arguments.verb + " --patches" * is_of_patches(arguments)])).named
    if foreign := [name for name in given if name.partition(".")[0] not in known]:
        raise ValueError(f"--{foreign[0].replace('_', '-')} does not go with {arguments.verb} --patches; leave it out")
    for text in others:
        if text.startswith("--") and "=" not in text:
            flags_of = [f"--{name.replace('_', '-')}" for name in known]
            raise ValueError(f"there is no flag {text}; {suggestion(text, flags_of)}")
        path, value = _entry(text)
        if path[0] not in known:
            raise ValueError(f"there is no argument {path[0]!r}; {suggestion(path[0], known)}")
        _put(given, path, value, text)
    if missing := [name for name, one in known.items() if one.required and name not in given]:
        raise ValueError(
            f"give {', '.join(f'--{name}' for name in missing)}; `widefield {arguments.verb} --help` says what they take"
        )
    return given


def _entry(text: str) -> tuple[list[str], Any]:
    name, equals, value = text.partition("=")
    path = name.removeprefix("--").replace("-", "_").split(".")
    if not equals or not all(path):
        raise ValueError(f"got {text!r}, expected key=value, as in epochs=10 or optim_args.lr=0.1")
    return path, None if value == "None" else parse_value(value)


def _put(given: dict[str, Any], path: list[str], value: Any, text: str) -> None:
    *outer, last = path
    for key in outer:
        given = given.setdefault(key, {})
        if not isinstance(given, dict):
            raise ValueError(f"{text}: {key} has the value {given!r} already, so nothing can be in it")
    given[last] = value
