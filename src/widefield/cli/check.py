"""`widefield check`: arguments."""

import argparse
import re

TAKES_OTHERS = False
EPILOG = """\
MODEL is one of
  my_file.py:model          an nn.Module in a file, or a class or function without required arguments that makes one
  package.module:attribute  the same in an installed module
  timm/NAME, torchvision/NAME

It is compared with plain PyTorch on a small random image, in float64: outputs, the image's gradient, every parameter's gradient.
Exit code: 0 exact, 1 not exact (wrong, refused, or streamed in part), 2 an error such as a file that is not there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help="which model, see below")
    parser.add_argument("--size", type=_size, default=(97, 113), metavar="HxW", help="compared (default: 97x113)")
    parser.add_argument("--channels", type=int, metavar="N", help="of the image (default: what the first layer takes)")
    parser.add_argument(
        "--plan-size", type=_size, default=(8192, 8192), metavar="HxW", help="planned for (default: 8192x8192)"
    )
    parser.add_argument("--tile-size", type=int, metavar="N", help="pixels per step of the plan (default: chosen)")
    parser.add_argument("--memory-budget", metavar="SIZE", help="of the plan, such as 2GiB (default: the free memory)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace, others: list[str]) -> int:
    """Check as the arguments say; 0 if the model is exact, else 1."""
    import json

    from widefield.cli.find_model import find_model, input_channels
    from widefield.streaming.check import check

    model = find_model(arguments.model)
    named = arguments.model.startswith(("timm/", "torchvision/"))
    channels = arguments.channels or (3 if named else input_channels(model))
    result = check(
        model,
        (channels, *arguments.size),
        plan_shape=(channels, *arguments.plan_size),
        plan_tile_size=arguments.tile_size,
        memory_budget=arguments.memory_budget,
    )
    print(json.dumps({"model": arguments.model, **result.as_dict()}, indent=2) if arguments.json else result)
    return 0 if result.exact else 1


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; give height and width as in 97x113")
    return int(match[1]), int(match[2])
