"""`widefield bench`: time and memory of training steps and forward passes on this machine, streamed, plain and by peers."""

import argparse
import copy
import errno
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from functools import partial
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import nn

from widefield.cli.inspect_model import channels_of, find_model
from widefield.cli.measuring import (
    DoesNotFit,
    Process,
    Timed,
    available_memory,
    bytes_at_peak,
    largest_size,
    limit_memory,
    machine,
    measure,
    memory_errors,
    memory_of,
    write_json,
)
from widefield.cli.ways import Way, Ways, What, compare, lightstream_tiles, one_pass, peers
from widefield.errors import WidefieldError
from widefield.reports.memory import PeakMemory
from widefield.streaming.budget import format_bytes, parse_bytes

_LARGEST = 1 << 18  # pixels a side, for which `--largest` plans at most
_SIZE = 1024  # pixels a side where none are given
_SMALL = 256  # pixels a side at most of the image that warms up
_FORMAT_SIZE = 1024  # pixels at most of the image on which memory formats are compared
_WARM_UP = 10.0  # seconds of passes in a new process


@dataclass(frozen=True)
class Mark:
    """An aim: the largest time over that of plain PyTorch, by the share of its memory."""

    model: str
    size: int
    step: Mapping[str, float]
    forward: Mapping[str, float] = field(default_factory=dict)


MARKS = (
    Mark("torchvision/resnet18", 2048, {"1/4": 1.05, "1/6": 1.15}, {"1/4": 0.8}),
    Mark("timm/efficientnet_b0", 1024, {"1/3": 1.1}, {"0.4": 1.15}),
    Mark("torchvision/resnet50", 2048, {"1/4": 1.05, "1/6": 1.15}, {"1/4": 0.8}),
    Mark("torchvision/convnext_tiny", 2048, {"1/4": 1.05, "1/6": 1.15}, {"1/4": 0.8}),
    Mark("timm/regnety_008", 1024, {"1/3": 1.1}, {"0.4": 1.15}),
    Mark("timm/convnextv2_nano", 1024, {"1/3": 1.1}, {"0.4": 1.15}),
    Mark("timm/resnet50_gn", 1024, {"0.4": 1.35}, {"0.4": 1.15}),
    Mark("torchvision/deeplabv3_resnet50", 1024, {"1/3": 1.15}),
    Mark("timm/hrnet_w18_small", 1024, {"1/3": 1.15}),
    Mark("torchvision/densenet121", 1024, {"1/3": 1.15}),
    Mark("torchvision/swin_t", 1024, {"1/3": 1.15}),
)
DEFAULT = MARKS[:2]
_LIGHTSTREAM = 5.0  # times faster than lightstream, at its peak


@dataclass(frozen=True)
class Case:
    """A pass through a network, on an image of `channels` and `size` x `size` pixels.

    `frozen`: norm layers do not train, for lightstream.
    """

    model: str
    size: int
    what: What
    dtype: str
    device: str
    channels_last: bool = False
    frozen: bool = False
    channels: int = 3

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the image."""
        return 1, self.channels, self.size, self.size

    def network(self) -> nn.Module:
        """Return the network in evaluation mode, so that all ways compute the same."""
        torch.manual_seed(0)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        model = copy.deepcopy(find_model(self.model)).eval()  # of a file it may be the same each time
        model.to(self.device, memory_format=layout)  # type: ignore[call-overload]
        for layer in model.modules() if self.frozen else ():
            if isinstance(layer, nn.BatchNorm2d):
                layer.requires_grad_(False)
        return model

    def image(self, size: int) -> torch.Tensor:
        """Return a random image; raises DoesNotFit."""
        with memory_errors():
            image = torch.rand(1, self.channels, size, size, device=self.device)
            return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image


def run(arguments: argparse.Namespace, others: list[str]) -> int:
    """Measure, print a table, and write the numbers as JSON; 1 if something failed, else 0."""
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: PyTorch finds no CUDA device; give --device cpu, or see torch.cuda.is_available()"
        )
    command = shlex.join(["widefield", *sys.argv[1:]])
    data: dict[str, Any] = {**machine(device), "command": command, "rows": []}
    _refuse(arguments)
    print(", ".join(str(data[key]) for key in ("date", "machine", "device", "torch")), f"{arguments.dtype}\n", sep=", ")
    print(*HEADER, sep="\n", flush=True)
    failed = False
    for case, budgets, marks in _cases(arguments):
        try:
            rows = bench(case, budgets, arguments.repeats) if not arguments.largest else largest(case)
        except (WidefieldError, RuntimeError, ValueError) as error:  # of one network, or of the process that runs it
            rows, failed = [{"way": "", "fits": False, "reason": str(error)}], True
        for row in rows:
            row |= {key: value for key, value in asdict(case).items() if key not in row and key != "device"}
            row["mark"] = _LIGHTSTREAM if row.get("peer_ratio") else marks.get(row.get("share") or "")
            data["rows"].append(row)
            print(table_row(row), flush=True)
            if row.get("reason"):
                print(f"{row['model']}, {row['what']}: {row['reason']}", file=sys.stderr, flush=True)
        if arguments.json is not None:
            write_json(arguments.json, data)
    return int(failed)


def _refuse(arguments: argparse.Namespace) -> None:
    """Raise an error for what cannot be measured or written, before anything runs."""
    if arguments.largest and arguments.budget:
        raise ValueError("--budget: --largest looks for an image size within the memory of the machine; leave one out")
    for budget in arguments.budget or ():
        _bytes(budget, 1 << 30)
    for name in arguments.model:
        if not any(weight.requires_grad for weight in find_model(name).parameters()):
            raise ValueError(f"{name} has no weights that train, so there is no training step to measure")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=arguments.json.parent).close()
        if arguments.json.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(arguments.json))
    if arguments.device == "cpu":
        bytes_at_peak(PeakMemory(torch.device("cpu")))


def _cases(arguments: argparse.Namespace) -> Iterator[tuple[Case, list[str], Mapping[str, float]]]:
    """Each case with its budgets and the marks for them, if there are some for its size, dtype and device."""
    known = {mark.model: mark for mark in MARKS}
    chosen = [known.get(name, Mark(name, _SIZE, {})) for name in arguments.model]
    for mark in chosen or (MARKS if arguments.all else DEFAULT):
        channels = channels_of(find_model(mark.model), mark.model)
        for size in arguments.size or [mark.size]:
            for what in ("step",) if arguments.largest else ("step", "forward"):
                wanted: Mapping[str, float] = getattr(mark, what)
                case = Case(mark.model, size, what, arguments.dtype, arguments.device, channels=channels)  # type: ignore[arg-type]
                same = (size, case.dtype, case.device) == (mark.size, "float32", "cpu")
                yield case, arguments.budget or list(wanted) or ["1/4", "1/2"], wanted if same else {}


def bench(case: Case, budgets: list[str], repeats: int) -> list[dict[str, Any]]:
    """Return a row for each way: plain, peers, and streamed within each of `budgets`, shares of plain's peak or bytes."""
    case = _in_faster_format(case)
    model = case.network()
    ways = Ways(model)
    plain = peaks_of(case, [Way()])[Way()]
    whole = memory_of(torch.device(case.device)) if plain is None else plain
    shares = {Way("streamed", budget): text for text in budgets for budget in [_bytes(text, whole)]}
    kinds = [*([] if plain is None else [Way()]), *peers(model, case.shape, case.what), *shares]
    rows = _measured(case, ways, kinds, repeats, whole)
    for row in rows:
        row["share"] = shares.get(Way(row["way"], row["budget"], None, row["window"]))
    if plain is None:
        rows.insert(0, {"way": "plain", "budget": None, "share": None, "fits": False, "reason": "out of memory"})
    tiles = lightstream_tiles(model, case.size) if case.what == "step" and plain is not None else []
    return rows + (_beside_lightstream(case, tiles, repeats) if tiles else [])


def _beside_lightstream(case: Case, tiles: list[int], repeats: int) -> list[dict[str, Any]]:
    """Return rows of lightstream, and streamed within the memory that it took; norm layers are frozen for all."""
    case = replace(case, frozen=True)
    ways = Ways(case.network())
    theirs = {Way("lightstream", window=tile): tile for tile in tiles}
    peaks = peaks_of(case, [Way(), *theirs])
    ours = {way: Way("streamed", peak) for way in theirs if (peak := peaks[way])}
    rows = _measured(case, ways, [Way(), *theirs, *ours.values()], repeats, max(peaks[way] or 0 for way in peaks))
    seconds = {(row["way"], row["budget"], row["window"]): row["seconds"] for row in rows}
    for way, own in ours.items():
        row = next(row for row in rows if row["way"] == "streamed" and row["budget"] == own.budget)
        other, own_seconds = seconds["lightstream", None, way.window], row["seconds"]
        row |= {"share": f"lightstream {way.window}"}
        row["peer_ratio"] = other / own_seconds if other and own_seconds else None
    return [{**row, "frozen": True} for row in rows]


def _measured(case: Case, ways: Ways, kinds: list[Way], repeats: int, peak: int) -> list[dict[str, Any]]:
    """Return the rows of `kinds`, with what they take relative to plain PyTorch."""
    rows = in_turn(case, ways, kinds, repeats, peak)
    seconds, plain = next(((row["seconds"], row["bytes"]) for row in rows if row["way"] == "plain"), (None, None))
    for row in rows:
        row |= {"plain_seconds": seconds, "plain_bytes": plain, "channels_last": case.channels_last}
        row["time_ratio"] = row["seconds"] / seconds if seconds and row["seconds"] else None
        row["memory_ratio"] = row["bytes"] / plain if plain and row["bytes"] else None
    return rows


def in_turn(case: Case, ways: Ways, kinds: list[Way], repeats: int, peak: int) -> list[dict[str, Any]]:
    """Return the rows of `kinds`, see `compare`.

    Processes that have `peak` bytes each and do not fit into memory beside one another follow one another.
    """
    beside = case.device != "cpu" or peak * len(kinds) < available_memory()
    rows = list[dict[str, Any]]()
    for group in [kinds] if beside else [[way] for way in kinds]:
        with ExitStack() as opened:
            passes = _passes(opened, case, group, ways)
            rows += compare(ways, passes, case.shape, case.what, case.dtype, repeats=repeats)
    return rows


def _passes(
    opened: ExitStack, case: Case, kinds: list[Way], ways: Ways | None = None, warm_up: float | None = None
) -> dict[Way, Callable[[], Timed]]:
    """Return what runs a pass in each way; on a CPU in a process of its own, which `opened` ends."""
    if case.device == "cpu":
        seconds = _WARM_UP if warm_up is None else warm_up
        return {way: opened.enter_context(closing(_Passes(case, way, seconds))) for way in kinds}
    here = (ways or Ways(case.network())).here(case.image(case.size), case.what, case.dtype)
    return {way: here(way) for way in kinds}


class _Passes:
    """Passes in a process of their own: called, it runs one, and returns its seconds and the bytes at the peak so far."""

    def __init__(self, case: Case, way: Way, warm_up: float) -> None:
        given = {"case": asdict(case), "way": asdict(way), "threads": torch.get_num_threads(), "warm_up": warm_up}
        self._process = Process(["-m", __name__, json.dumps(given)])
        self.close = self._process.close

    def __call__(self) -> Timed:
        seconds, peak = self._process.ask()
        return seconds, peak


def peaks_of(case: Case, kinds: list[Way], warm_up: float | None = None) -> dict[Way, int | None]:
    """Bytes at the peak in each way; None where it does not fit.

    On a CPU they are those of all passes of `warm_up` seconds, one at least, and by default of ten seconds.
    """
    peaks: dict[Way, int | None] = dict.fromkeys(kinds)
    for way in kinds:
        with ExitStack() as opened, suppress(DoesNotFit):
            warm_ups = 0 if case.device == "cpu" else 1
            passes = _passes(opened, case, [way], warm_up=warm_up)
            found = measure(passes, warm_ups=warm_ups, repeats=1)[way]
            peaks[way] = max(found.peaks, default=None)
    return peaks


def answers(case: Case, way: Way, warm_up: float) -> Iterator[Any]:
    """Run passes in this process, after one over a small image; yields seconds, and bytes at the peak so far.

    They are those above weights, gradients and the image. The passes of the first `warm_up` seconds bring the heap into use; they
    take turns with nobody, and count as one. Where memory is short, the last answer says what is `too_large`.
    """
    limit_memory()
    try:
        ways = Ways(case.network())
        run = ways.run(way)
        model = run if isinstance(run, nn.Module) else ways.model
        with memory_errors():
            one_pass(run, model, case.image(min(case.size, _SMALL)), case.what, case.dtype)
            if way.how == "streamed":
                _plan(ways, way, case)
            one = ways.here(case.image(case.size), case.what, case.dtype)(way)
        memory, begin = PeakMemory(torch.device(case.device)), time.perf_counter()
        while True:
            seconds, _ = one()
            if time.perf_counter() - begin > warm_up:
                yield seconds, bytes_at_peak(memory)
    except DoesNotFit as error:
        yield {"too_large": str(error)}


def _plan(ways: Ways, way: Way, case: Case) -> None:
    """Plan a pass before it is measured; raises DoesNotFit where memory is too small."""
    try:
        ways.plan(way, case.shape, case.what, case.dtype)
    except ValueError as error:
        raise DoesNotFit(str(error)) from None


def _in_faster_format(case: Case) -> Case:
    """Return the case with channels last where plain PyTorch is faster so, on an image that is not large."""
    small = replace(case, size=min(case.size, _FORMAT_SIZE))
    formats = {last: replace(small, channels_last=last) for last in (False, True)}
    with ExitStack() as opened:
        passes = {last: _passes(opened, one, [Way()])[Way()] for last, one in formats.items()}
        found = measure(passes)
    return replace(case, channels_last=min(formats, key=lambda last: found[last].median or float("inf")))


def largest(case: Case) -> list[dict[str, Any]]:
    """Return the largest sizes of which a step fits: plain, to some 10%, and streamed: twice as large, and by its plan."""
    case = replace(case, channels_last=True)
    ways = Ways(case.network())
    ways.plan(Way("streamed"), case.shape, case.what, case.dtype)  # a network that cannot be streamed is told at once

    def fits(way: Way, size: int) -> bool:
        return peaks_of(replace(case, size=size), [way], warm_up=0.0)[way] is not None

    low, high = largest_size(partial(fits, Way()), case.size)
    size = 2 * max(low, case.size // 2)
    rows: list[dict[str, Any]] = [
        {"way": "plain", "fits": low > 0, "size": low, "too_large": high},
        {"way": "streamed", "fits": fits(Way("streamed"), size), "size": size},
    ]
    with suppress(ValueError):  # of a plan for which the memory is too small
        while rows[1]["fits"] and size < _LARGEST:
            size *= 2
            plan = ways.plan(Way("streamed"), replace(case, size=size).shape, case.what, case.dtype)
            rows[2:] = [{"way": "streamed, by its plan", "fits": True, "size": size, **plan}]
    return [{**row, "what": "largest"} for row in rows]


def _bytes(budget: str, whole: int) -> int:
    """Return the bytes of a budget that is a share of `whole`, such as 1/4 or 0.4, or bytes, such as 2GiB."""
    share = re.fullmatch(r"0?\.[0-9]+|1(\.0*)?|[1-9][0-9]*/[1-9][0-9]*", budget)
    with suppress(ValueError):
        if size := int(Fraction(budget) * whole) if share else parse_bytes(budget):
            return size
    raise ValueError(f"--budget: {budget!r} is no share such as 1/4, and no size such as 2GiB")


HEADER = (
    "| model | pixels | dtype | pass | way | budget | s | s / plain | planned | MiB | MiB / plain | planned MiB | mark |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def table_row(row: Mapping[str, Any]) -> str:
    """Return a line of the table of results, in Markdown."""

    def number(key: str, form: str, unit: float = 1) -> str:
        return "" if row.get(key) is None else format(row[key] / unit, form)

    way = f"{row['way']} {row['window']}" if row.get("window") else row["way"]
    way += ", norms frozen" if row.get("frozen") else ""
    way += "".join(f", {kind} on the host" for kind in ("maps", "carries") if row.get(kind) == "host")
    budget = row.get("share") or (format_bytes(row["budget"]) if row.get("budget") else "")
    seconds, passes = number("seconds", ".3f"), row.get("all_seconds") or ()
    if len(passes) > 1:
        seconds += f" ({min(passes):.2f} to {max(passes):.2f})"
    seconds = seconds + (" (first pass)" if row.get("cold") else "") if row["fits"] else "does not fit"
    mark = ""
    if row.get("mark") and row.get("peer_ratio"):
        mark = f"{row['peer_ratio']:.1f} times faster, at least {row['mark']:g}"
    elif row.get("mark"):
        mark = f"at most {row['mark']:.2f}"
    cells = (
        *(row["model"].rpartition("/")[2], row["size"], row["dtype"], row["what"], way, budget, seconds),
        *(
            number("time_ratio", ".2f"),
            number("predicted_overhead", ".2f"),
            number("bytes", ".0f", 2**20),
            number("memory_ratio", ".2f"),
            number("predicted_bytes", ".0f", 2**20),
            mark,
        ),
    )
    return f"| {' | '.join(map(str, cells))} |"


def _serve(given: Mapping[str, Any]) -> None:
    """Answer each line that comes in, as `_Passes` asks."""
    with os.fdopen(os.dup(1), "w") as to:
        os.dup2(2, 1)  # whatever else is written there is no answer
        torch.set_num_threads(given["threads"])
        found = answers(Case(**given["case"]), Way(**given["way"]), given["warm_up"])
        for _ in sys.stdin:
            print(json.dumps(next(found)), file=to, flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
