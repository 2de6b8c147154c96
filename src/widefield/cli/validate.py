"""`widefield validate`: arguments, which are those of `widefield test`."""

import argparse

from widefield.cli.test import EPILOG as _EPILOG
from widefield.cli.test import TAKES_OTHERS, add_arguments, evaluate_verb

__all__ = ["EPILOG", "TAKES_OTHERS", "add_arguments", "run"]
EPILOG = "".join(_EPILOG.splitlines(keepends=True)[:2])


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Validate as the arguments say."""
    evaluate_verb(arguments, others, "validate")
