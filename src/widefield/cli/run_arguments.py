"""Arguments that name a trained model: the folder of its run, or a configuration with a checkpoint. Imports nothing heavy."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from widefield.cli.user_code import add_imports

if TYPE_CHECKING:
    from widefield.config import Config

_CONFIG, _LAST = "config.yaml", "last.ckpt"


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declare `--run`, `--config`, `--checkpoint` and `--imports`."""
    parser.add_argument("--run", type=Path, metavar="DIR", help="folder that `widefield fit` wrote")
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="configuration (default: that of --run)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="CKPT", help="weights (default: last.ckpt in the folder of --run)"
    )
    add_imports(parser)


def read_run(arguments: argparse.Namespace, others: list[str]) -> "tuple[Config, Path]":
    """The configuration, and the checkpoint.

    Raises:
        ValueError: Neither is named, or entries of the configuration are wrong.
        FileNotFoundError: A file is not there.
    """
    from jsonargparse import ArgumentError

    from widefield.cli.configuration import read_configuration
    from widefield.config import ConfigError

    if arguments.run is None and not (arguments.config and arguments.checkpoint):
        raise ValueError(
            "which model? name the folder of a run with --run DIR, or give --config FILE and --checkpoint CKPT"
        )
    files = list(arguments.config) or [arguments.run / _CONFIG]
    checkpoint: Path = arguments.checkpoint or arguments.run / _LAST
    if not arguments.config and not files[0].is_file():
        raise FileNotFoundError(f"there is no run in {arguments.run}: {files[0]} does not exist")
    if not checkpoint.is_file():
        raise FileNotFoundError(f"the checkpoint {checkpoint} does not exist")
    try:
        config, left = read_configuration(argparse.Namespace(imports=arguments.imports), files, others)
    except (ArgumentError, ConfigError) as error:
        raise ValueError(str(error)) from error
    if left:
        raise ValueError(f"unknown arguments: {' '.join(left)}")
    return config, checkpoint
