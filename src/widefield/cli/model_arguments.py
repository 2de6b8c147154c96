"""Arguments of the verbs that look at a model: its name, and sizes. Imports nothing heavy: `--help` needs it."""

import argparse
import re

MODELS = """\
MODEL is one of
  my_file.py:model          an nn.Module in a file, or a class or function without required arguments that makes one
  package.module:attribute  the same in an installed module
  timm/NAME, torchvision/NAME
"""


def add_model(parser: argparse.ArgumentParser) -> None:
    """Declare `MODEL` and `--channels`."""
    parser.add_argument("model", metavar="MODEL", help="which model, see below")
    parser.add_argument("--channels", type=int, metavar="N", help="of the image (default: what the first layer takes)")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Declare what a plan is made by, and `--json`."""
    parser.add_argument("--tile-size", type=int, metavar="N", help="pixels per step of the plan (default: chosen)")
    parser.add_argument("--memory-budget", metavar="SIZE", help="of the plan, such as 2GiB (default: the free memory)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def size(text: str) -> tuple[int, int]:
    """(height, width) from "97x113"."""
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give height and width as in 97x113")
    return int(match[1]), int(match[2])
