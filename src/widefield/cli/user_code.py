"""Files of users with components of theirs."""

import argparse
from collections.abc import Iterable


def add_imports(parser: argparse.ArgumentParser) -> None:
    """Declare `--imports`."""
    parser.add_argument(
        "--imports",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file (or module) with components of yours; may be given several times",
    )


def import_user_code(places: Iterable[str]) -> None:
    """Run the files, or import the modules, once each."""
    from widefield.registry import import_module_or_file

    for place in places:
        import_module_or_file(place)
