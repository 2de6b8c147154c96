"""`widefield plan`: arguments."""

import argparse

from widefield.cli.model_arguments import MODELS, add_model, add_plan, size

TAKES_OTHERS = False
EPILOG = f"""\
{MODELS}
No pixel is computed. Of every layer that reads windows you see its receptive field and its stride in pixels of the image, the rows
that it carries from one tile row to the next, and how many rows and columns at the borders of its output read padding: what a
tiling with halos would lose at the borders of a tile as large as the image.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_model(parser)
    parser.add_argument("--size", type=size, required=True, metavar="HxW", help="of the image, such as 80000x100000")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    parser.add_argument("--inference", action="store_true", help="plan a forward pass (default: a training step)")
    add_plan(parser)


def run(arguments: argparse.Namespace, others: list[str]) -> int:
    """Plan as the arguments say."""
    import json

    import torch

    from widefield.cli.find_model import find_model, image_channels
    from widefield.streaming import stream

    model = find_model(arguments.model)
    channels = arguments.channels or image_channels(arguments.model, model)
    streamed = stream(model, arguments.tile_size, memory_budget=arguments.memory_budget)
    with torch.set_grad_enabled(not arguments.inference):
        plan = streamed.plan((arguments.batch, channels, *arguments.size))
    if arguments.json:
        print(json.dumps({"model": arguments.model, **plan.as_dict()}, indent=2))
    else:
        print(plan, *plan.refused, sep="\n\n")
    return 0
