"""`widefield visualize`: arguments."""

import argparse
from collections.abc import Callable
from pathlib import Path

from widefield.cli.run_arguments import add_run
from widefield.cli.user_code import add_imports

TAKES_OTHERS = True
EPILOG = """\
`widefield visualize cam --help` and so on show the arguments of each picture.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    pictures = parser.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    for name, (summary, declare) in _PICTURES.items():
        one = pictures.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        declare(one)


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Draw as the arguments say."""
    from widefield.cli import draw

    if arguments.picture == "cam" and others:
        raise ValueError(f"unknown arguments: {' '.join(others)}")
    getattr(draw, f"draw_{arguments.picture}")(arguments, others)


def _cam(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGES", help="image files, or folders to search for them"
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="CKPT", help="a .ckpt file, or the folder of its run"
    )
    parser.add_argument("--layer", metavar="NAME", help="such as backbone.layer3 (default: the backbone's last map)")
    parser.add_argument("--class", dest="label", metavar="CLASS", help="name or index (default: the predicted one)")
    parser.add_argument("--out", type=Path, default=Path("cam"), metavar="DIR", help="(default: ./cam)")
    add_imports(parser)


def _tsne(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--stage", choices=("backbone", "neck", "pre_logits"), default="backbone", help="(default: backbone)"
    )
    parser.add_argument("--split", choices=("train", "val", "test"), default="val", help="which images (default: val)")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="at most so many images (default: 1000)")
    parser.add_argument("--perplexity", type=float, metavar="X", help="neighbours that count (default: 30, or less)")
    parser.add_argument("--out", type=Path, default=Path("tsne.png"), metavar="PNG", help="(default: tsne.png)")


def _schedule(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, action="append", required=True, metavar="FILE", help="configuration")
    parser.add_argument(
        "--steps-per-epoch",
        type=int,
        metavar="N",
        help="optimizer steps, for a schedule that goes on with each of them",
    )
    parser.add_argument("--out", type=Path, default=Path("schedule.png"), metavar="PNG", help="(default: schedule.png)")
    add_imports(parser)


def _confusion(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("confusion.png"), metavar="PNG", help="(default: confusion.png)"
    )


_PICTURES: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "cam": ("where in an image a class was seen, at any layer (Grad-CAM)", _cam),
    "tsne": ("features of labelled images as points in a plane (t-SNE)", _tsne),
    "schedule": ("the learning rate of every epoch", _schedule),
    "confusion": ("which classes are taken for which, on test images", _confusion),
}
