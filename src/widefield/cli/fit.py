"""`widefield fit`, on the command line and in Python: arguments, and how they become a Lightning configuration."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from widefield.cli.user_code import add_imports

TAKES_OTHERS = True
EPILOG = """\
The flags above are shortcuts for the most used entries of a LightningCLI configuration, which is saved as config.yaml in
the output folder. Every other entry can be given by its own name (`--trainer.precision bf16-mixed`,
`--trainer.accumulate_grad_batches 4`, `model.pooling=max`, `data.val_fraction=0.3`, with or without the dashes) or in a file
with --config, YAML or Python; what is given on the command line wins. A file may describe components by their `type`, and be
based on others with `_base_`; `widefield config check FILE` says what is wrong with it.
`metrics=[{type: Accuracy, topk: [1, 5]}]`, of those that `widefield list metrics` names, are computed in validation and test.
`optimizer={type: SGD, lr: 0.1}` is one of torch's, `lr_scheduler` one of its schedules or a list of them, one after the other:
`lr_scheduler=[{type: LinearLR, end: 5}, {type: CosineAnnealingLR, T_max: 95}]`; `paramwise_cfg={norm_decay_mult: 0.0}` sets some
parameters apart.
`widefield fit --print_config` prints all entries with their defaults.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="folder of image files")
    parser.add_argument(
        "--labels", type=Path, metavar="CSV", help="table with the columns image, label and maybe split"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="resnet18, ..., a narrow one such as resnet18_w16, or timm/NAME"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the checkpoints, the configuration and the report"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--level", type=int, metavar="N", help="level of the image pyramids, 0 the largest (default: 0)"
    )
    parser.add_argument(
        "--weights", metavar="FILE", help="weights to start from, or DEFAULT to download (default: random)"
    )
    parser.add_argument("--memory-budget", metavar="SIZE", help="such as 2GiB (default: chosen from the free memory)")
    parser.add_argument("--tile-size", metavar="N", help="pixels per step: N or [HEIGHT, WIDTH] (default: chosen)")
    parser.add_argument("--epochs", type=int, metavar="N", help="passes over the training images (default: 20)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per optimizer step (default: 1)")
    parser.add_argument("--lr", type=float, metavar="X", help="learning rate of AdamW (default: 0.001)")
    parser.add_argument("--seed", type=int, metavar="N", help="of weights, split, order and crops (default: 0)")
    parser.add_argument(
        "--config", type=Path, action="append", default=[], metavar="FILE", help="configuration to start from"
    )
    add_imports(parser)


def fit(
    out: str | Path,
    images: str | Path | None = None,
    labels: str | Path | None = None,
    model: str | None = None,
    *,
    config: str | Path | Sequence[str | Path] = (),
    imports: Sequence[str] = (),
    resume: bool = False,
    **entries: Any,
) -> Path:
    """Train a classifier on whole images with one label each, as `widefield fit` does.

    Args:
        out: Folder of the checkpoints, the configuration and the report.
        images: Folder of image files.
        labels: CSV file with the columns image, label and maybe split.
        model: resnet18, ..., a narrow one such as resnet18_w16, or timm/NAME.
        config: Configuration to start from, YAML or Python, or several, each over the last.
        imports: Python files (or modules) with components of yours.
        resume: Continue the run in `out`.
        entries: The other flags of the command by their names (`epochs=3`, `memory_budget="2GiB"`), and entries of the
            configuration by their paths (`**{"trainer.precision": "bf16-mixed"}`).

    Returns:
        The folder of the results.

    Raises:
        ValueError, OSError, UnsupportedOpError: What was given cannot be used; the message says why.
    """
    from widefield.cli.configuration import SHORTCUTS

    flags = {name: entries.pop(name) for name in (*SHORTCUTS, "seed") if name in entries}
    flags |= {name: list(value) for name, value in flags.items() if isinstance(value, tuple)}
    places = {name: None if place is None else Path(place) for name, place in (("images", images), ("labels", labels))}
    files = [Path(file) for file in ([config] if isinstance(config, (str, Path)) else config)]
    arguments = argparse.Namespace(
        out=Path(out), model=model, config=files, imports=list(imports), resume=resume, **places, **flags
    )
    return _train(arguments, [f"{path}={json.dumps(value, default=str)}" for path, value in entries.items()])


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Train as the arguments say; `others` are entries of the configuration."""
    _train(arguments, others)


def _train(arguments: argparse.Namespace, others: list[str]) -> Path:
    from jsonargparse import ArgumentError

    from widefield.cli.configuration import read_configuration
    from widefield.cli.fit_run import train
    from widefield.config import ConfigError

    try:
        config, left = read_configuration(arguments, _files(arguments), others)
        return train(config, left, resume=arguments.resume)
    except (ArgumentError, ConfigError) as error:
        raise ValueError(_in_shortcuts(str(error))) from error


def _in_shortcuts(message: str) -> str:
    """The message with the names of the flags where it names the entries that they fill."""
    from widefield.cli.configuration import SHORTCUTS

    for name, entry in SHORTCUTS.items():
        message = message.replace(entry, f"--{name.replace('_', '-')}")
    return message


def _files(arguments: argparse.Namespace) -> list[Path]:
    files = list(arguments.config)
    if arguments.resume:
        if arguments.out is None:
            raise ValueError("--resume continues the run in a folder; name it with --out DIR")
        saved = arguments.out / "config.yaml"
        if not saved.is_file():
            raise FileNotFoundError(f"there is no run to resume in {arguments.out}: {saved} does not exist")
        files.insert(0, saved)
    return files
