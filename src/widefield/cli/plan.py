"""`widefield plan`: arguments."""

import argparse
from typing import TYPE_CHECKING, Any

from widefield.cli.model_arguments import MODELS, add_model, add_plan, size

if TYPE_CHECKING:
    from widefield.streaming import Plan

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
    from widefield.streaming.layers import layer_table

    model = find_model(arguments.model)
    channels = arguments.channels or image_channels(arguments.model, model)
    streamed = stream(model, arguments.tile_size, memory_budget=arguments.memory_budget)
    with torch.set_grad_enabled(not arguments.inference):
        plan = streamed.plan((arguments.batch, channels, *arguments.size))
    if arguments.json:
        print(json.dumps({"model": arguments.model, **_as_dict(plan)}, indent=2))
    else:
        print(plan, *plan.refused, layer_table(plan.layers), sep="\n\n")
    return 0


def _as_dict(plan: "Plan") -> dict[str, Any]:
    """`plan` as plain data, for JSON."""
    from dataclasses import asdict

    return {
        "image_shape": plan.image_shape,
        "tile_size": plan.tile_size,
        "steps": plan.steps,
        "stages": plan.stages,
        "predicted_bytes": dict(plan.predicted_bytes),
        "total_bytes": plan.total_bytes,
        "map_bytes": plan.map_bytes,
        "map_place": plan.map_place,
        "streamed_fraction": plan.streamed_fraction,
        "refused": [vars(error) for error in plan.refused],
        "layers": [asdict(layer) for layer in plan.layers],
    }
