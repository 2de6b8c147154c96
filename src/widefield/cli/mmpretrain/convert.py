"""`widefield config convert`: a whole configuration of MMPretrain as one of ours, and a list of what is not the same."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from widefield.cli.fit_sections import SECTIONS
from widefield.cli.mmpretrain import data, models, runs
from widefield.cli.mmpretrain.entries import Notes
from widefield.cli.mmpretrain.keys import FOREIGN
from widefield.components.component import BackboneConfig
from widefield.config import Config, ConfigError, check_config, check_value, load, write_yaml
from widefield.config.mmengine_files import read_mmengine
from widefield.registry import MODELS, import_module_or_file, near_names

_VERSION_0 = ("data", "optimizer_config", "lr_config", "evaluation", "checkpoint_config", "log_config", "workflow")
_SLIPS = [key for key, foreign in FOREIGN.items() if not key.endswith("_pipeline") and foreign.is_harmless is None]
"""Keys of which a misspelling would lose something."""
_NORMS = ("norm", "ln", "bn", "gn")
"""Parts of the names of norm layers, under which theirs set weight decays."""


@dataclass(frozen=True)
class Converted:
    """A configuration of theirs as ours.

    Attributes:
        data: What `widefield fit --config` reads.
        notes: A line for each thing that was left out or is not the same, with the place where it was written.
        problems: A line for each thing that keeps the configuration from being used; `widefield config check` says the same.
        takes_place: The network of timm that `--timm` puts in the place of a backbone that is not here, if there is one.
    """

    data: dict[str, Any]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    takes_place: str | None


def run(arguments: argparse.Namespace) -> int:
    """Convert the file, write the result, and list what is not the same.

    Raises:
        ValueError: The file cannot be read, or there is nothing to convert in it.
        FileExistsError: There is a file already where the result would be written.
    """
    file = Path(arguments.file)
    out: Path | None = arguments.out
    if out is not None and out.exists():
        raise FileExistsError(f"{out} exists already; name another file with --out")
    for place in arguments.imports:
        import_module_or_file(place)
    found = convert(file, timm=arguments.timm)
    text = f"# {file.name} of MMPretrain, converted.\n{write_yaml(found.data)}"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
    for line in found.notes:
        print(line, file=sys.stderr)
    for line in found.problems:
        print(f"cannot be used as it is: {line}", file=sys.stderr)
    if found.takes_place:
        print(f"timm's {found.takes_place} takes the place of the backbone with --timm", file=sys.stderr)
    return 1 if found.problems else 0


def convert(file: Path, timm: bool = False) -> Converted:
    """Return the configuration in a file of MMPretrain as ours.

    Args:
        file: Python in either style of MMEngine, which is read and not run; or YAML or JSON.
        timm: Put a network of timm in the place of a backbone that is not here.

    Raises:
        FileNotFoundError: The file, or one that it is based on, is not there.
        ValueError: It cannot be read, describes no model, or `timm` finds nothing in the place of its backbone.
    """
    if file.suffix == ".py":
        old, unread = read_mmengine(file)
    else:
        old, unread = load(file), []
    if not isinstance(old.data.get("model"), Mapping):
        raise ConfigError(f"{file} describes no model, so there is nothing to convert")
    notes: Notes = []
    _note_unread(old.data, file.suffix == ".py", notes)
    made, takes_place = _sections(old.data, timm, notes)
    problems = _problems(made)
    if not problems:
        try:
            _drop_unmatched_keys(made, notes)
        except (ValueError, TypeError, RuntimeError) as error:
            problems = [f"model: {error}"]
    problems += _unnamed_checkpoints(made["model"], "model")
    written = str(old.error(*notes)).splitlines() if notes else []
    return Converted(made, (*unread, *written), tuple(problems), takes_place)


def _sections(old: Mapping[str, Any], timm: bool, notes: Notes) -> tuple[dict[str, Any], str | None]:
    trainer: dict[str, Any] = {}
    model = models.model(old, data.reads_rgb(old), notes)
    if isinstance(model.get("prototype"), dict):
        model["prototype"] = data.prototype(model["prototype"], notes)
    takes_place = None
    backbone = model.get("backbone") or {}
    if backbone and check_value(backbone, BackboneConfig):
        found = models.replacement(backbone)
        if timm:
            model = models.with_timm(model, notes)
        else:
            takes_place = found and found[0]
    runs.loops(old, trainer, notes)
    optimization = runs.optimization(old, trainer, notes)
    runs.hooks(old, model, trainer, notes)
    settings = runs.settings(old, trainer, notes)
    made = {
        "imports": (old.get("custom_imports") or {}).get("imports"),
        "model": model,
        "data": data.data(old, notes),
        "metrics": runs.evaluators(old, notes),
        **optimization,
        "trainer": trainer,
        **settings,
    }
    return {key: value for key, value in made.items() if value}, takes_place


def _note_unread(old: Mapping[str, Any], has_variables: bool, notes: Notes) -> None:
    """Note keys that MMPretrain does not read; those of Python files are mostly variables, unless they look like a key."""
    for key in old:
        if key in _VERSION_0:
            notes.append(((key,), "a key of MMClassification 0.x, which is not read"))
        elif key not in FOREIGN and key != "model":
            near = near_names(key, _SLIPS)
            if near and abs(len(near[0]) - len(key)) < 2:
                notes.append(((key,), f"MMPretrain does not read it; did you mean {near[0]}?"))
            elif not has_variables:
                notes.append(((key,), "MMPretrain does not read it; it was left out"))


def _problems(made: dict[str, Any]) -> list[str]:
    for place in made.get("imports") or ():
        import_module_or_file(place)
    try:
        check_config(Config(made), SECTIONS)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def _unnamed_checkpoints(described: Any, path: str) -> Iterator[str]:
    """Yield a line for each checkpoint in a description whose file is to be filled in."""
    if isinstance(described, list):
        described = {str(k): one for k, one in enumerate(described)}
    if not isinstance(described, Mapping):
        return
    if described.get("type") == "Pretrained" and not described.get("checkpoint"):
        yield f"{path}.checkpoint: got '', expected a file; name it there, or leave the {path.rpartition('.')[2]} out"
    for key, value in described.items():
        yield from _unnamed_checkpoints(value, f"{path}.{key}")


def _drop_unmatched_keys(made: dict[str, Any], notes: Notes) -> None:
    """Leave out custom keys that are in no parameter's name, which theirs accepts and ours does not.

    Raises:
        ValueError, TypeError, RuntimeError: The model cannot be made.
    """
    options = made.get("paramwise_cfg") or {}
    keys = options.get("custom_keys")
    if not keys:
        return
    try:
        with torch.device("meta"):
            model = MODELS.build(made["model"])
    except NotImplementedError:  # a constructor that looks at weights
        model = MODELS.build(made["model"])
    names = [name for name, _ in model.named_parameters()]
    for key in [key for key in keys if not any(key in name for name in names)]:
        factors = keys.pop(key)
        path = ("optim_wrapper", "paramwise_cfg", "custom_keys", key)
        if key.strip(".") in _NORMS and set(factors) == {"decay_mult"}:
            options.setdefault("norm_decay_mult", factors["decay_mult"])
        else:
            notes.append((path, "it is in no parameter's name and was left out"))
    if not keys:
        del options["custom_keys"]
    if not options:
        del made["paramwise_cfg"]
