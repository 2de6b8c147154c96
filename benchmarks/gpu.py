"""What a large GPU can do: steps of 8192 to 32768 pixels a side, the largest image in 40 GiB, maps and carries on the host.

    PYTHONPATH=src python benchmarks/gpu.py --json benchmarks/results/h200.json [--seconds 380] [--parts 0 1 2]

Rows come in the order of their worth, and each is written to the file as soon as it is measured; after `--seconds` the script ends,
wherever it is. Plain PyTorch, `torch.utils.checkpoint`, torch.compile and streaming take turns in one process; medians; peak memory
is what PyTorch allocates above the weights, their gradients and the image. Everything is channels last.
"""

import argparse
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision

from widefield.cli.measuring import DoesNotFit, largest_size, machine, memory_errors, memory_of, write_json
from widefield.cli.ways import Way, Ways, compare, one_pass

BEGIN = time.perf_counter()


class Session:
    """The rows so far, where they are written, and the time that is left."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.head = {**machine(self.device), "command": f"python benchmarks/gpu.py {' '.join(sys.argv[1:])}"}
        self.rows: list[dict[str, Any]] = []

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        write_json(self.options.json, {**self.head, "rows": self.rows})
        shown = {key: value for key, value in row.items() if key not in ("all_seconds", "predicted_bytes", "stages")}
        print(f"[{time.perf_counter() - BEGIN:.0f} s]", shown, flush=True)

    @property
    def left(self) -> float:
        return float(self.options.seconds) - (time.perf_counter() - BEGIN)

    def model(self, name: str) -> Ways:
        torch.manual_seed(0)
        if name.startswith("timm/"):
            net = timm.create_model(name.removeprefix("timm/"))
        else:
            net = torchvision.models.get_model(name, weights=None)
        ways = Ways(net.eval().to(self.device, memory_format=torch.channels_last))
        ways.streamed.verify = False
        return ways

    def image(self, size: int) -> torch.Tensor:
        shape = (1, 3, size, size)
        return torch.rand(shape, device=self.device).contiguous(memory_format=torch.channels_last)

    def clear(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def compared(
    session: Session,
    name: str,
    ways: Ways,
    size: int,
    dtype: str,
    kinds: list[Way],
    what: Any = "step",
    limit: float = 25,
    warm_ups: int = 2,
    **more: Any,
) -> list[dict[str, Any]]:
    """Measure and write a row for each of `kinds`, with `more` in it."""
    if session.left < 10:
        return []
    image = session.image(size)
    here = ways.here(image, what, dtype)
    passes = {way: here(way) for way in kinds}
    limit = min(limit, session.left)
    rows = compare(ways, passes, tuple(image.shape), what, dtype, warm_ups=warm_ups, repeats=3, limit=limit)
    plain = next((row for row in rows if row["way"] == "plain" and row["seconds"]), None)
    for row in rows:
        ratios = {}
        if plain and row["seconds"]:
            ratios = {"time_ratio": row["seconds"] / plain["seconds"]}
            if plain["bytes"]:
                ratios["memory_ratio"] = row["bytes"] / plain["bytes"]
        session.add(model=name, size=size, dtype=dtype, what=what, **row, **ratios, **more)
    del image, here, passes
    session.clear()
    return rows


def at_shares(session: Session, name: str, ways: Ways, size: int, dtype: str) -> None:
    """Plain, checkpoint, and streamed at 1/2 and 1/4 of plain's peak, or of the memory of the device where plain does not fit."""
    if session.left < 15:
        return
    passes = {Way(): ways.here(session.image(size), "step", dtype)(Way())}
    first = compare(ways, passes, (1, 3, size, size), "step", dtype, warm_ups=0, repeats=1)[0]
    del passes
    session.clear()
    whole = first["bytes"] or memory_of(session.device)
    kinds = [Way("checkpoint"), Way("streamed", whole // 2), Way("streamed", whole // 4)]
    if first["fits"]:
        kinds.insert(0, Way("plain"))
    else:
        session.add(model=name, size=size, dtype=dtype, what="step", **first)
    compared(session, name, ways, size, dtype, kinds, share_of="plain" if first["fits"] else "device")
    if first["fits"]:
        forward = [Way("plain"), Way("streamed", whole // 8)]
        compared(session, name, ways, size, dtype, forward, "forward", 10, share_of="plain step")


def largest(session: Session, name: str, ways: Ways, cap: int, start: int, dtype: str) -> None:
    """The largest image of which a step fits within `cap` bytes, plain (found by trying) and streamed (of host memory, uint8)."""
    total = memory_of(session.device)
    if session.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))

    def tried(run: Any, image: Callable[[], torch.Tensor]) -> float | None:
        try:
            with memory_errors():
                pixels = image()
                begin = time.perf_counter()
                one_pass(run, ways.model, pixels, "step", dtype)
                if session.device.type == "cuda":
                    torch.cuda.synchronize()
                return time.perf_counter() - begin
        except DoesNotFit:
            return None
        finally:
            session.clear()

    def fits(size: int) -> bool:
        return session.left > 20 and tried(ways.model, lambda: session.image(size)) is not None

    head: dict[str, Any] = {"model": name, "dtype": dtype, "what": "largest", "cap": cap}
    low, high = largest_size(fits, start)
    seconds = tried(ways.model, lambda: session.image(low))
    session.add(**head, way="plain", size=low, too_large=high, seconds=seconds)
    way, size, rate = Way("streamed", int(0.85 * cap)), 2 * max(low, 32), 0.0
    while session.left > 20 + 1.3 * rate * size**2 and size <= session.options.largest:
        try:
            plan = ways.plan(way, (1, 3, size, size), "step", dtype)
        except ValueError as error:
            session.add(**head, way="streamed", size=size, fits=False, reason=str(error))
            break
        seconds = tried(ways.run(way), lambda: host_image(session, size))  # noqa: B023
        row = {**head, "way": "streamed", "size": size, "fits": seconds is not None, "seconds": seconds}
        session.add(**row, image="uint8, in host memory", **plan)
        if seconds is None:
            break
        rate, size = seconds / size**2, 2 * size
    if session.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)


def host_image(session: Session, size: int) -> torch.Tensor:
    image = torch.empty(1, 3, size, size, dtype=torch.uint8)
    for y in range(0, size, 4096):
        rows = image[:, :, y : y + 4096]
        rows.copy_(torch.randint(256, rows.shape, dtype=torch.uint8, device=session.device))
    return image


def on_the_host(session: Session, name: str, size: int, dtype: str) -> None:
    """Maps between stages on the device and on the host."""
    ways = session.model(name)
    kinds = [Way("plain"), Way("streamed", None, "device"), Way("streamed", None, "host")]
    compared(session, name, ways, size, dtype, kinds, limit=20, warm_ups=1)


def carries_on_the_host(session: Session, name: str, ways: Ways, size: int, dtype: str) -> None:
    """The largest of some small budgets at which the plan moves carries to the host."""
    for budget in (memory_of(session.device) // 2**k for k in range(3, 12)):
        try:
            plan = ways.plan(Way("streamed", budget), (1, 3, size, size), "step", dtype)
        except ValueError as error:
            row = {"model": name, "size": size, "dtype": dtype, "what": "step", "way": "streamed", "budget": budget}
            session.add(**row, fits=False, reason=str(error))
            return
        if plan["carries"] != "device":
            compared(session, name, ways, size, dtype, [Way("streamed", budget)], limit=15, warm_ups=1)
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file that is written")
    parser.add_argument("--seconds", type=float, default=380, help="after which the script ends")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs=2, default=["resnet50", "convnext_tiny"])
    parser.add_argument("--dtypes", nargs=2, default=["bfloat16", "float32"])
    parser.add_argument("--stages", default="timm/convnextv2_nano", help="a model of many stages, for maps on the host")
    parser.add_argument("--size", type=int, default=8192, help="the smallest; twice and four times as large follow")
    parser.add_argument("--cap", type=float, default=40, help="GiB in which the largest image is looked for")
    parser.add_argument("--largest", type=int, default=65536, help="no streamed image is larger than this")
    parser.add_argument("--parts", type=int, nargs="+", default=list(range(14)), help="which parts, from 0")
    session = Session(parser.parse_args())
    options = session.options
    watchdog = threading.Timer(options.seconds, lambda: os._exit(0))  # what was measured is on disk
    watchdog.daemon = True
    watchdog.start()
    resnet, convnext = options.models
    size = options.size
    networks: dict[str, Ways] = {name: session.model(name) for name in options.models}
    cap = int(options.cap * 2**30)
    half, full = options.dtypes
    parts: list[Callable[[], object]] = [
        lambda: at_shares(session, resnet, networks[resnet], size, half),
        lambda: at_shares(session, convnext, networks[convnext], size, half),
        lambda: largest(session, resnet, networks[resnet], cap, size // 2, half),
        lambda: at_shares(session, resnet, networks[resnet], size, full),
        lambda: at_shares(session, convnext, networks[convnext], size, full),
        lambda: on_the_host(session, options.stages, size // 2, half),
        lambda: at_shares(session, resnet, networks[resnet], 2 * size, half),
        lambda: carries_on_the_host(session, resnet, networks[resnet], 2 * size, half),
        lambda: at_shares(session, convnext, networks[convnext], 2 * size, half),
        lambda: at_shares(session, resnet, networks[resnet], 2 * size, full),
        lambda: at_shares(session, convnext, networks[convnext], 2 * size, full),
        lambda: compared(
            *(session, resnet, networks[resnet], 4 * size, half),
            [Way("streamed", memory_of(session.device) // 2)],
            limit=1,
            warm_ups=0,
        ),
        lambda: compared(
            *(session, convnext, networks[convnext], 4 * size, half),
            [Way("streamed", memory_of(session.device) // 2)],
            limit=1,
            warm_ups=0,
        ),
        lambda: compared(
            *(session, resnet, networks[resnet], size, half),
            [Way("plain"), Way("compiled"), Way("streamed")],
        ),
    ]
    for part in (parts[k] for k in options.parts):
        if session.left < 10:
            break
        try:
            with memory_errors():
                part()
        except Exception as error:  # the rows behind it are measured nevertheless
            session.add(what="failed", reason=f"{type(error).__name__}: {error}"[:2000])
        session.clear()
    watchdog.cancel()


if __name__ == "__main__":
    main()
