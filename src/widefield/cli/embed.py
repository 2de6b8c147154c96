"""`widefield embed`: arguments."""

import argparse
from pathlib import Path

from widefield.cli.call import add_call, call
from widefield.cli.pretrain import one_or_all

TAKES_OTHERS = True
EPILOG = """\
Formats: torch, csv, lightly_csv, parquet. Images of any size are resized to image_size (default: [224, 224]).
Every other argument of widefield.embed is given as key=value, such as image_size=128 or num_workers=4. Slides, each as a whole:
image_size=null level=1 streaming.memory_budget=2GiB
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("--out", type=Path, metavar="FILE", help="file that is written")
    parser.add_argument(
        "--data", action="append", metavar="PATH", help="folder of images, or an image file; may be given several times"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="CKPT", help="a .ckpt file that `widefield pretrain` wrote")
    parser.add_argument("--format", metavar="FORMAT", help="(default: torch)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at a time (default: 128)")
    add_call(parser)


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Embed as the arguments say."""
    from widefield.pretraining import embed

    arguments.data = one_or_all(arguments.data)
    call(embed, arguments, others)
