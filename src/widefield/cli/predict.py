"""`widefield predict`: arguments."""

import argparse
from pathlib import Path

from widefield.cli.user_code import add_imports, import_user_code

TAKES_OTHERS = False
EPILOG = """\
Writes predictions.csv (image, a probability per class, the predicted class) and one overlay per image: the evidence for
the predicted class on a thumbnail, where the model has a map of the image. Each row is on disk before the next image is
read; an image that fails is named, the others go on, and the exit code is 2.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="CKPT", help="a .ckpt file that `widefield fit` wrote"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="of a model of components (default: config.yaml beside the checkpoint)",
    )
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGES", help="image files, or folders to search for them"
    )
    parser.add_argument("--out", type=Path, default=Path("predictions"), metavar="DIR", help="(default: ./predictions)")
    parser.add_argument(
        "--level", type=int, metavar="N", help="level of the image pyramids (default: that of the training)"
    )
    parser.add_argument("--memory-budget", metavar="SIZE", help="such as 2GiB (default: chosen from the free memory)")
    parser.add_argument("--tile-size", type=int, metavar="N", help="pixels per step (default: chosen)")
    parser.add_argument("--tta", metavar="VIEWS", help="average over views: hflip, vflip, crop=SIDE, with commas")
    add_imports(parser)


def run(arguments: argparse.Namespace, others: list[str]) -> None:
    """Predict as the arguments say."""
    from widefield.cli.predict_images import predict
    from widefield.inference.averaged_views import AveragedViews

    import_user_code(arguments.imports)
    predict(
        arguments.checkpoint,
        arguments.images,
        arguments.out,
        config=arguments.config,
        level=arguments.level,
        memory_budget=arguments.memory_budget,
        tile_size=arguments.tile_size,
        views=None if arguments.tta is None else AveragedViews.parse(arguments.tta),
    )
