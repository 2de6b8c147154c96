"""Check the convolutional families of timm and torchvision: is each streamed exactly, and how much of it?

    uv run python benchmarks/zoo.py --out docs/zoo.md
    uv run python benchmarks/zoo.py --pattern 'timm/resnet*' --rows

Each row is a model with random weights: norm layers have statistics and affine parameters that are not trivial, layer scales and
gains that start at 0 are random. `widefield.streaming.check` compares its streamed with its whole-image result in float64, on an
image of 97 x 113 pixels or the next size that the model accepts, in a process of its own with a time limit. Results are
appended to build/zoo.jsonl as they come; `--resume` goes on with such a file. The rows are in `zoo_rows.py`.
"""

import argparse
import collections
import datetime
import fnmatch
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import zoo_rows
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree
from zoo_rows import Row

from widefield.streaming.check import ENOUGH, EXACT, TOLERANCE, VERDICTS, check

BY_HAND = "\n## Attention in windows\n"  # of the page, and all below it
RESULTS = Path(__file__).parents[1] / "build" / "zoo.jsonl"
FAILURES = ("cannot run", "timed out", "crashed")  # verdicts of rows that `check` gave none for


def check_row(row: Row, seed: int) -> dict[str, Any]:
    """The row's result, as plain data."""
    torch.manual_seed(seed)
    begin = time.perf_counter()
    model = row.build().eval()
    result: dict[str, Any] = {"model": row.name, "parameters": sum(p.numel() for p in model.parameters())}
    reason = ""
    for size in row.sizes:
        try:
            randomise(model, size, seed)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            reason = reason or f"{size[0]}x{size[1]}: {str(error).splitlines()[0] if str(error) else 'an assertion'}"
            continue
        fresh = row.build()  # without what a forward pass may have cached in the model
        fresh.load_state_dict(model.state_dict())
        found = check(fresh, (3, *size), plan_shape=None, seed=seed)
        result.update(found.as_dict(), worst_error=found.worst_error, other_size=reason)
        return {**result, "seconds": round(time.perf_counter() - begin, 1)}
    return {**result, "verdict": "cannot run", "reason": reason}


def randomise(model: nn.Module, size: tuple[int, int], seed: int) -> None:
    """Random values for what is constant at first; running statistics near those of random images, so that signals stay alive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                if parameter.flatten()[0] == 0:
                    parameter.normal_(0, 0.2, generator=generator)
                else:
                    parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.numel() == 1 and parameter == 0:
                parameter.uniform_(0.5, 1.0, generator=generator)  # the gain of a residual branch
        norms = [part for part in model.modules() if isinstance(part, _NormBase) and part.running_mean is not None]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        try:
            outputs = model(torch.randn(2, 3, *size, generator=generator))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.eval()
                norm.momentum = momentum
        assert any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(outputs))
        for norm in norms:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            spread = norm.running_var.clamp_min(1e-2).sqrt()
            norm.running_mean += 0.1 * spread * torch.randn(spread.shape, generator=generator)
            norm.running_var.clamp_min_(1e-2).mul_(torch.empty(spread.shape).uniform_(0.8, 1.25, generator=generator))


def run_row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """`check_row` in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, "--row", name, "--seed", str(options.seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit, env=environment)
    except subprocess.TimeoutExpired:
        return {"model": name, "verdict": "timed out", "reason": f"took more than {options.limit} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"model": name, "verdict": "crashed", "reason": last, "seconds": round(time.perf_counter() - begin, 1)}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def environment() -> dict[str, str]:
    """Where the rows are measured."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "date": str(datetime.date.today()),
        "machine": f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}",
        "versions": f"torch {torch.__version__}, timm {timm.__version__}, torchvision {torchvision.__version__}",
        "commit": git.stdout.strip() or "unknown",
    }


def counts(results: list[dict[str, Any]]) -> str:
    """How many of the results are exact, in one line, and how many of each verdict."""
    exact = sum(result["verdict"] in EXACT for result in results)
    by = collections.Counter(result["verdict"] for result in results)
    return f"{exact} of {len(results)} exact ({', '.join(f'{by[v]} {v}' for v in (*VERDICTS, *FAILURES) if by[v])})"


def summary(results: list[dict[str, Any]]) -> list[str]:
    """Lines that count: all rows, then by where the models come from."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["model"].partition("/")[0], []).append(result)
    return [f"all rows: {counts(results)}", *(f"{group}: {counts(part)}" for group, part in groups.items())]


def page(results: list[dict[str, Any]], where: list[dict[str, str]], command: str) -> str:
    """The whole Markdown page."""
    lines = [
        "# The zoo",
        "",
        "Small members of every convolutional family of timm and torchvision, with random weights, against plain PyTorch",
        "on the whole image in float64. *Exact* means that outputs, the image's gradient and every parameter's gradient",
        f"differ by at most {TOLERANCE:.0e}, relative to the largest value of each. Where a random model amplifies rounding, they",
        "may differ by 100 times as much as plain PyTorch's own results do when image and weights change by one unit in the last",
        "place, but never by more than 1e-06. Written by",
        "",
        f"    {command}",
        "",
        *(f"{w['date']}, {w['machine']}, {w['versions']}, commit {w['commit']}." for w in where),
        "",
        *(f"- {line}" for line in summary(results)),
        "",
        f"*exact*: one scan, at least {ENOUGH:.0%} of the activation bytes streamed. *exact with stages*: the same, in several",
        "scans, because of operations over the whole image. *exact trunk, rest whole*: exact results; all that comes before",
        "the first operation on tokens is streamed. *partly*: exact results, but less is streamed. Anything else is no",
        "success. The size is that of the image compared; a model that does not accept 97 x 113 gets the next that it does.",
        "",
        "| model | size | verdict | stages | streamed | largest error | in the way |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(cells(result))} |" for result in results]
    if not_run := [row.name for row in zoo_rows.rows() if row.name not in {result["model"] for result in results}]:
        lines += ["", f"Not run yet ({len(not_run)}): {', '.join(not_run)}."]
    lines += ["", "## Left out", "", "Modules of timm without convolutional models:", ""]
    lines += [f"- `{module}`: {reason}" for module, reason in zoo_rows.TIMM_LEFT_OUT.items()]
    lines += ["", "Families of torchvision:", ""]
    lines += [f"- `{family}`: {reason}" for family, reason in zoo_rows.TORCHVISION_LEFT_OUT.items()]
    missing = zoo_rows.uncovered()
    lines += ["", f"Modules of timm that are in neither list: {', '.join(missing) or 'none'}."]
    return "\n".join(lines) + "\n"


def cells(result: dict[str, Any]) -> list[str]:
    """A row of the table."""
    size = "x".join(map(str, result.get("image_shape", [])[2:]))
    error, stages = result.get("worst_error"), result.get("stages")
    first = next(iter(result.get("refused", [])), None)
    way = f"`{first['module_path']}`: {first['op']}" if first else result.get("reason", "")
    more = len({(error["module_path"], error["op"]) for error in result.get("refused", [])}) - 1
    way += f" and {more} more" if more > 0 else ""
    share = f"{result['streamed_fraction']:.1%}" if stages else ""
    shown = "" if error is None else f"{error:.1e}"
    return [
        f"`{result['model']}`",
        size,
        result["verdict"],
        str(stages or ""),
        share,
        shown,
        way.replace("|", "\\|")[:160],
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the page here")
    parser.add_argument("--pattern", nargs="+", default=["*"], help="only rows whose name fits, as in 'timm/resnet*'")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, each with one thread")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="per row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, metavar="FILE.jsonl", help="go on with the rows that this file holds")
    parser.add_argument(
        "--rows", action="store_true", help="list the rows, and the modules of timm without one; run nothing"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    rows = {row.name: row for row in zoo_rows.rows() if any(fnmatch.fnmatch(row.name, p) for p in options.pattern)}
    if options.row:
        torch.set_num_threads(1)
        print(json.dumps(check_row(rows[options.row], options.seed)))
        return 0
    print(f"modules of timm without a row: {', '.join(zoo_rows.uncovered()) or 'none but those left out for a reason'}")
    if options.rows:
        print("\n".join(rows))
        return 0
    path = options.resume or RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    if not options.resume:
        path.unlink(missing_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = {result["model"]: result for result in map(json.loads, lines)}
    todo = [name for name in rows if name not in results]
    here = environment()
    with ThreadPoolExecutor(options.jobs) as pool, path.open("a", encoding="utf-8") as file:
        for result in pool.map(lambda name: run_row(name, options), todo):
            results[result["model"]] = result = {**result, "environment": here}
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(f"{' | '.join(cells(result))} | {result.get('seconds', '')} s", flush=True)
    shown = [results[name] for name in rows]
    print("\n".join(summary(shown)))
    if options.out:
        where = {json.dumps(result["environment"]): result["environment"] for result in shown}
        command = f"uv run python benchmarks/zoo.py {' '.join(sys.argv[1:])}"
        old = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
        by_hand = "".join(old.partition(BY_HAND)[1:])
        options.out.write_text(page(shown, list(where.values()), command) + by_hand, encoding="utf-8")
    return 0 if all(result["verdict"] in EXACT for result in shown) else 1


if __name__ == "__main__":
    sys.exit(main())
