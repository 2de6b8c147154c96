"""A verb of the command line: its arguments, and how each is read from text. Imports nothing heavy."""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from widefield.inference.names import HUB_PREFIX

Declaration = tuple[str, dict[str, Any]]
"""The name and the options that `ArgumentParser.add_argument` takes."""


@dataclass(frozen=True)
class Verb:
    """A verb, or one of its parts.

    Attributes:
        summary: Shown in the list of verbs.
        run: `package.module:function`. It is called with the arguments and with those that are not declared here, and returns
            the exit code, or None for 0.
        arguments: Declared beside `--verbose`.
        epilog: Shown below the arguments.
        takes_others: True if it takes undeclared arguments too, such as entries of a configuration.
        light: True if it has to answer at once, so that nothing is imported which it does not need itself.
        check: Like `run`, called before it and before torch is imported; raises what is wrong.
        usage: In place of the usage that argparse writes.
        parts: Verbs behind the verb, of which one has to be named.
    """

    summary: str
    run: str = ""
    arguments: tuple[Declaration, ...] = ()
    epilog: str = ""
    takes_others: bool = False
    light: bool = False
    check: str = "widefield.cli.first_checks:check_paths"
    usage: str | None = None
    parts: "Mapping[str, Verb]" = field(default_factory=dict)

    @property
    def description(self) -> str:
        """The summary as a sentence."""
        return f"{self.summary[0].upper()}{self.summary[1:]}."


def _reader(read: Callable[[str], Any], message: str) -> Callable[[str], Any]:
    """Return `read` for argparse, which shows `message` of a text that makes it raise a ValueError."""

    def reader(text: str) -> Any:
        try:
            return read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(message.format(repr(text))) from None

    return reader


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ValueError
        return int(text)

    return read


def _not_empty(kind: type) -> Callable[[str], Any]:
    """Return a reader of a list or mapping in YAML."""

    def read(text: str) -> Any:
        import yaml

        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        if not isinstance(value, kind) or not value:
            raise ValueError
        return value

    return read


def _height_and_width(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if not match:
        raise ValueError
    return int(match[1]), int(match[2])


def _between_0_and_1(text: str) -> tuple[float, ...]:
    shares = tuple(float(part) for part in text.split(","))
    if not all(0 < share < 1 for share in shares):
        raise ValueError
    return shares


read_count = _reader(_at_least(1), "got {}, expected a whole number, at least 1")
read_passes = _reader(_at_least(0), "got {}, expected a whole number, at least 0, as in 20")
"""A number of passes, which Lightning would repeat without an end where it is negative."""
read_sharing = _reader(
    _at_least(1),
    "got {}, expected a number of processes, at least 1; to let all share an image, give --split-images last",
)
"""A number of processes; what follows a flag without one may be an entry of the configuration."""
read_columns = _reader(_not_empty(dict), "{} names no columns; give them as in '{{image: slide, label: grade}}'")
read_names = _reader(
    lambda text: [str(name) for name in _not_empty(list)(text)], "{} names no classes; give them as in '[ground, tree]'"
)
read_size = _reader(_height_and_width, "{} is not a size; give height and width as in 97x113")
read_shares = _reader(_between_0_and_1, "{} are no thresholds; give numbers between 0 and 1, as in 0.25,0.5")
_READERS: dict[Callable[[str], Any], Callable[[str], Any]] = {
    int: _reader(int, "got {}, expected a whole number, as in 3"),
    float: _reader(float, "got {}, expected a number, as in 0.25"),
}
"""In place of argparse's own, which say "invalid int value"."""


def read_formats(text: str) -> tuple[str, ...]:
    """Return formats of heatmaps from "png,geojson"."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if wrong := [name for name in names if name not in HEATMAPS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is no format; give some of {', '.join(HEATMAPS)}, with commas")
    return names


def checkpoint_argument(text: str) -> str | Path:
    """Return the name of a model on the Hugging Face Hub, or else the path of a file or folder."""
    return text if text.startswith(HUB_PREFIX) else Path(text)


def foreground_argument(text: str | Path) -> str | Path:
    """Return the name of a way to find the foreground, or else the path of a file or folder that says it."""
    return text if text in FOREGROUNDS else Path(text)


def option(name: str, metavar: str | None, text: str, kind: Callable[[str], Any] = str, **options: Any) -> Declaration:
    """Return the declaration of an argument with a value, of which `text` is the help."""
    return name, {"metavar": metavar, "help": text, "type": _READERS.get(kind, kind), **options}


def flag(name: str, text: str, **options: Any) -> Declaration:
    """Return the declaration of an argument that is there or not."""
    return name, {"action": "store_true", "help": text, **options}


FOREGROUNDS = ("auto", "none", "otsu", "hsv")
"""Ways to find the foreground, see `widefield.images.ForegroundChoice`."""
HEATMAPS = ("png", "tiff", "geojson")
"""Formats of heatmaps."""
IMPORTS = option(
    "--imports",
    "FILE",
    "a Python file (or module) with components of yours; may be given several times",
    action="append",
    default=[],
)
IMAGES = option("images", "IMAGES", "image files, or folders to search for them", Path, nargs="+")


def foreground(default: str) -> Declaration:
    """Return the declaration of --foreground, whose default is told."""
    return option(
        "--foreground",
        "METHOD",
        f"what is computed of an image: {', '.join(FOREGROUNDS)}, a GeoJSON file, or a folder with NAME.geojson for each image "
        f"(default: {default})",
        foreground_argument,
    )


MEMORY_BUDGET = option("--memory-budget", "SIZE", "such as 2GiB (default: chosen from the free memory)")
