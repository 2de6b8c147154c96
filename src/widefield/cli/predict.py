"""`widefield predict`: arguments."""

import argparse
from pathlib import Path

TAKES_OTHERS = False
EPILOG = """\
Writes predictions.csv (image, a probability per class, the predicted class) and one overlay per image: the evidence for
the predicted class on a thumbnail.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="CKPT", help="a .ckpt file that `widefield fit` wrote"
    )
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="image files, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="(default: ./predictions)")
    parser.add_argument(
        "--level", type=int, metavar="N", help="level of the image pyramids (default: that of the training)"
    )
    parser.add_argument("--memory-budget", metavar="SIZE", help="such as 2GiB (default: chosen from the free memory)")
    parser.add_argument("--tile-size", type=int, metavar="N", help="pixels per step (default: chosen)")


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Predict as the arguments say."""
    from widefield.cli.prediction import predict

    predict(
        arguments.checkpoint,
        arguments.images,
        arguments.out,
        level=arguments.level,
        memory_budget=arguments.memory_budget,
        tile_size=arguments.tile_size,
    )
