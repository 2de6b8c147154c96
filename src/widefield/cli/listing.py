"""`widefield list`: what there is by name. Answers from the index of components and from the files of others, without torch."""

import argparse
import fnmatch
import sys

from widefield.cli.user_code import add_imports, import_user_code

LIGHT = True
TAKES_OTHERS = False
_REGISTRIES = {
    "datasets": "widefield.registry:DATASETS",
    "transforms": "widefield.registry:TRANSFORMS",
    "methods": "widefield.pretraining.methods:METHODS",
    "metrics": "widefield.components.metrics:METRICS",
}
EPILOG = """\
PATTERN may have * and ?; without them it is any part of a name.
`widefield help NAME` shows the arguments of a component.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("what", choices=("models", "components", "configs", *_REGISTRIES), help="what is listed")
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="only names that match")
    parser.add_argument("--kind", metavar="KIND", help="only components of this kind, such as backbone")
    add_imports(parser)


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Print one name a line, with its kind and a summary if there are some."""
    from widefield.registry import import_object

    import_user_code(arguments.imports)
    rows: list[tuple[str, ...]]
    if arguments.what in _REGISTRIES:
        registry = import_object(_REGISTRIES[arguments.what])
        rows = [(entry.name, entry.kind or "-", entry.summary) for entry in registry.entries(arguments.pattern)]
    elif arguments.what == "components":
        rows = _components(arguments.pattern, arguments.kind)
    elif arguments.what == "models":
        from widefield.inference.names import matches, model_names

        rows = [(name, summary) for name, _, summary in _components(arguments.pattern, "model")]
        rows += [(name,) for name in model_names() if matches(name, arguments.pattern)]
    else:
        from widefield.config.load import ready_configs, summary

        rows = [(name, summary(name)) for name in fnmatch.filter(ready_configs(), _wildcards(arguments.pattern))]
    if not rows:
        print(f"no {arguments.what} match", file=sys.stderr)
    widths = [max(map(len, column)) for column in zip(*rows)] if rows and len({len(row) for row in rows}) == 1 else []
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths or map(len, row))).rstrip())


def _components(pattern: str, kind: str | None) -> list[tuple[str, ...]]:
    from widefield.registry import MODELS

    found = sorted(MODELS.entries(pattern, kind), key=lambda entry: entry.kind)
    return [(entry.name, entry.kind or "-", entry.summary) for entry in found]


def _wildcards(pattern: str) -> str:
    return pattern if any(wildcard in pattern for wildcard in "*?[") else f"*{pattern}*"
