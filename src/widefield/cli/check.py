"""`widefield check`: arguments."""

import argparse

from widefield.cli.model_arguments import MODELS, add_model, add_plan, size

TAKES_OTHERS = False
EPILOG = f"""\
{MODELS}
It is compared with plain PyTorch on a small random image, in float64: outputs, the image's gradient, every parameter's gradient.
Exit code: 0 exact, 1 not exact (wrong, refused, or streamed in part), 2 an error such as a file that is not there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_model(parser)
    parser.add_argument("--size", type=size, default=(97, 113), metavar="HxW", help="compared (default: 97x113)")
    parser.add_argument(
        "--plan-size", type=size, default=(8192, 8192), metavar="HxW", help="planned for (default: 8192x8192)"
    )
    add_plan(parser)
    parser.add_argument(
        "--explain", action="store_true", help="tell what each pass over the model's operations makes, and every layer"
    )


def run(arguments: argparse.Namespace, others: list[str]) -> int:
    """Check as the arguments say; 0 if the model is exact, else 1."""
    import json

    from widefield.cli.find_model import find_model, image_channels
    from widefield.streaming.check import check, explain

    model = find_model(arguments.model)
    channels = arguments.channels or image_channels(arguments.model, model)
    result = check(
        model,
        (channels, *arguments.size),
        plan_shape=(channels, *arguments.plan_size),
        plan_tile_size=arguments.tile_size,
        memory_budget=arguments.memory_budget,
    )
    told = {"explanation": explain(model, (channels, *arguments.size))} if arguments.explain and result.stages else {}
    if arguments.json:
        print(json.dumps({"model": arguments.model, **result.as_dict(), **told}, indent=2))
    else:
        print(result, *told.values(), sep="\n\n")
    return 0 if result.exact else 1
