"""`widefield pretrain`: arguments."""

import argparse
from pathlib import Path

from widefield.cli.call import add_call, call

TAKES_OTHERS = True
EPILOG = """\
Every other argument of widefield.pretrain is given as key=value, with dots for entries of dictionaries; a value is YAML:
  widefield pretrain --out out/run --data images --model torchvision/resnet18 method=dino optim_args.lr=0.1
  widefield pretrain --out out/run --data images --model my_file.py:MyWrapper transform_args.image_size=128 \\
      loggers.tensorboard=null
`widefield list methods` shows the methods; --imports FILE brings one of yours.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the run, new or empty")
    parser.add_argument(
        "--data", action="append", metavar="PATH", help="folder of images, or an image file; may be given several times"
    )
    parser.add_argument("--method", metavar="NAME", help="(default: simclr)")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the images (default: 100)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images of a step (default: 128)")
    parser.add_argument("--seed", type=int, metavar="N", help="of all that is drawn (default: 0)")
    parser.add_argument("--resume", action="store_true", dest="resume_interrupted", help="continue the run in --out")
    add_call(parser)


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Pretrain as the arguments say."""
    from widefield.pretraining import pretrain

    arguments.data = one_or_all(arguments.data)
    call(pretrain, arguments, others)


def one_or_all(data: list[str] | None) -> str | list[str] | None:
    """A folder alone is not a list of folders: images are then named by their paths in it."""
    return data[0] if data is not None and len(data) == 1 else data
