"""`widefield demo`: arguments."""

import argparse
from pathlib import Path

TAKES_OTHERS = False
EPILOG = """\
Makes pyramidal TIFFs of 1152 x 1152 pixels from photographs that scikit-image ships, labelled by marks that a thumbnail
loses; then runs `widefield fit` and `widefield predict` on them, and on their thumbnails for comparison. Takes some
100 CPU-seconds, needs no GPU and downloads nothing.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "--out", type=Path, default=Path("widefield-demo"), metavar="DIR", help="(default: ./widefield-demo)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the images and the training (default: 0)")


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Make the images, train, predict and write the report."""
    from widefield.cli.demo.experiment import run_experiment

    run_experiment(arguments.out, arguments.seed)
