"""`widefield export`: arguments."""

import argparse
from pathlib import Path

from widefield.cli.call import add_call, call

TAKES_OTHERS = True
EPILOG = """\
Formats: package_default, torch_state_dict, torch_model (the module itself, pickled), safetensors.
Only torch_model needs --model, and only if the run was not given its model by name.
Arguments of widefield.export may also be given as key=value.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("--out", type=Path, metavar="FILE", help="file that is written")
    parser.add_argument("--checkpoint", type=Path, metavar="CKPT", help="a .ckpt file that `widefield pretrain` wrote")
    parser.add_argument("--part", metavar="PART", help="model, wrapped_model or embedding_model (default: model)")
    parser.add_argument("--format", metavar="FORMAT", help="(default: package_default, a state dict)")
    add_call(parser)


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Export as the arguments say."""
    from widefield.pretraining import export

    call(export, arguments, others)
