"""`widefield test` and `widefield validate`: arguments."""

import argparse
from pathlib import Path

from widefield.cli.run_arguments import add_run, read_run

TAKES_OTHERS = True
EPILOG = """\
Shows the loss, and the metrics under `metrics` in the configuration, such as `metrics=[{type: Accuracy, topk: [1, 5]}]`.
Entries of the configuration can be given as for `widefield fit`: `data.batch_size=8`, `trainer.precision=bf16-mixed`.
Without test images, `test` takes the validation images and shows what `fit` showed at its end.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_run(parser)
    parser.add_argument(
        "--tta", metavar="VIEWS", help="metrics of scores averaged over views: hflip, vflip, crop=SIDE, with commas"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the numbers to this JSON file")


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Test or validate, as `arguments.verb` says, and show the numbers."""
    from widefield.cli.evaluate import evaluate, show, write_json
    from widefield.inference.averaged_views import AveragedViews

    views = None if arguments.tta is None else AveragedViews.parse(arguments.tta)
    config, checkpoint = read_run(arguments, others)
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        raise FileNotFoundError(f"the folder of {arguments.out} does not exist")
    numbers = evaluate(config, checkpoint, arguments.verb, views)
    print(show(numbers))
    if arguments.out is not None:
        write_json(arguments.out, numbers)
