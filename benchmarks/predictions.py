"""Do plans keep their word? Predicted bytes and time of training steps, beside what is measured, of 24 networks.

    uv pip install --no-deps segmentation-models-pytorch diffusers
    uv run --no-sync python benchmarks/predictions.py [--share 1/3] [--times] [--rows 0 1 2 ...] [--json FILE]

Each network gets a share of plain PyTorch's peak as its budget, or the smallest budget that works if that is more. Peaks are those
of all steps of ten seconds in a process of its own, above the weights, their gradients and the image, and may be measured on a
busy machine.
`--times` wants an idle one: streamed and plain steps take turns, each in a process of its own, and ratios are of medians. Prints
the table of `widefield bench`.
"""

import argparse
import re
import shlex
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from widefield.cli.bench import HEADER, Case, in_turn, peaks_of, table_row
from widefield.cli.measuring import DoesNotFit, machine, write_json
from widefield.cli.ways import Way, Ways
from widefield.errors import WidefieldError

HERE = Path(__file__).parent
TUNED = [
    ("torchvision/resnet18", 1024),
    ("torchvision/resnet50", 768),
    ("torchvision/convnext_tiny", 768),
    ("timm/efficientnet_b0", 768),
    ("torchvision/densenet121", 768),
    ("torchvision/mobilenet_v2", 768),
    ("torchvision/vgg11", 768),
]
"""Networks on which constants of the planner were chosen, and the height and width of the image."""
OTHERS = [
    (f"{HERE}/networks.py:unet", 768),
    (f"{HERE}/networks.py:unet_group_norm", 768),
    (f"{HERE}/decoders.py:rrdb", 384),
    (f"{HERE}/decoders.py:autoencoder", 512),
    (f"{HERE}/networks.py:monai_unet", 768),
    ("torchvision/deeplabv3_resnet50", 640),
    ("torchvision/fcn_resnet50", 640),
    ("torchvision/lraspp_mobilenet_v3_large", 768),
    ("torchvision/swin_t", 672),
    ("torchvision/regnet_x_800mf", 768),
    ("torchvision/shufflenet_v2_x1_0", 1024),
    ("timm/hrnet_w18_small", 768),
    ("timm/regnety_008", 768),
    ("timm/convnextv2_nano", 768),
    ("timm/resnet50_gn", 640),
    ("timm/resnet34", 1024),
    ("timm/dla34", 768),
]
ROWS = TUNED + OTHERS


def row_of(model: str, size: int, share: str, times: bool) -> dict[str, Any]:
    """Measure a network."""
    case = Case(model, size, "step", "float32", "cpu", channels_last=True)
    ways = Ways(case.network())
    plain = peaks_of(case, [Way()])[Way()]
    if plain is None:
        raise DoesNotFit("a step of plain PyTorch does not fit into memory")
    way, shape = Way("streamed", int(Fraction(share) * plain)), (1, 3, size, size)
    try:
        planned = ways.plan(way, shape, "step", "float32")
    except ValueError as error:  # names the smallest budget
        smallest = re.search(r"\((\d+) bytes", str(error))
        if smallest is None:
            raise
        way = Way("streamed", int(smallest[1]))
        planned = ways.plan(way, shape, "step", "float32")
    row = {
        "model": model,
        "size": size,
        "dtype": "float32",
        "what": "step",
        "way": "streamed",
        "plain_bytes": plain,
        **planned,
    }
    peak = peaks_of(case, [way])[way]
    row |= {"budget": way.budget, "fits": peak is not None, "bytes": peak}
    row["memory_ratio"] = None if peak is None else peak / plain
    if times and peak is not None:
        plainly, streamed = in_turn(case, ways, [Way(), way], 3, plain)
        row |= {"seconds": streamed["seconds"], "time_ratio": streamed["seconds"] / plainly["seconds"]}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--share", default="1/3", help="of plain's peak (default: 1/3)")
    parser.add_argument("--times", action="store_true", help="also measure seconds")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=range(len(ROWS)), help="numbers of networks (default: all)"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    command = shlex.join(["python", "benchmarks/predictions.py", *sys.argv[1:]])
    data: dict[str, Any] = {**machine("cpu"), "command": command, "rows": []}
    print(*HEADER, sep="\n", flush=True)
    for k in options.rows:
        model, size = ROWS[k]
        try:
            row = row_of(model, size, options.share, options.times)
        except WidefieldError as error:
            row = {"model": model, "size": size, "fits": False, "reason": str(error)}
            row |= {"dtype": "float32", "what": "step", "way": "streamed"}
        row["model"] = Path(model).name
        data["rows"].append(row)
        print(table_row(row), flush=True)
        if options.json:
            write_json(options.json, data)


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
