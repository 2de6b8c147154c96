import importlib.util
import json
import weakref
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from widefield.cli import bench, main
from widefield.cli.measuring import DoesNotFit, Process, largest_size, measure, memory_errors, timed
from widefield.cli.ways import Way, Ways, one_pass, peers

ROOT = Path(__file__).parents[2]
MODEL = """
from torch import nn


def net():
    blocks = [nn.Sequential(nn.Conv2d(n, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()) for n in (3, 8)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
"""
ROW = {
    *("model", "size", "dtype", "what", "way", "budget", "share", "fits", "channels_last"),
    *("seconds", "bytes", "plain_seconds", "plain_bytes", "time_ratio", "memory_ratio"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("models") / "tiny.py"
    file.write_text(MODEL)
    return f"{file}:net"


class Here:
    """Stands for a process: passes are measured here, as a process for each, which imports torch, takes seconds."""

    def __init__(self, command: list[str]) -> None:
        given = json.loads(command[-1])
        self.way = Way(**given["way"])
        self.answers = bench.answers(bench.Case(**given["case"]), self.way, given["warm_up"])

    def ask(self) -> Any:
        return next(self.answers)

    def close(self) -> None:
        pass


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Process", Here)
    monkeypatch.setattr(bench, "limit_memory", lambda: None)  # it would hold for all tests
    monkeypatch.setattr(bench, "_WARM_UP", 0.0)


def run(*arguments: str, to: Path) -> dict[str, Any]:
    assert main(["bench", *arguments, "--repeats", "1", "--json", str(to)]) == 0
    return json.loads(to.read_text())


@pytest.mark.usefixtures("in_this_process")
def test_the_command_prints_a_table_and_writes_its_numbers(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "new.json"
    assert (
        main(["bench", "--model", model, "--size", "64", "--budget", "32MiB", "--repeats", "1", "--json", str(to)]) == 0
    )
    data = json.loads(to.read_text())
    assert data.keys() >= {"machine", "device", "torch", "date", "command", "rows"}
    kinds = [(row["what"], row["way"], row["share"]) for row in data["rows"]]
    step = [("step", "plain", None), ("step", "checkpoint", None), ("step", "streamed", "32MiB")]
    assert kinds == [*step, ("forward", "plain", None), ("forward", "streamed", "32MiB")]
    for row in data["rows"]:
        assert row.keys() >= ROW
        assert row["fits"] and row["seconds"] > 0 and row["bytes"] >= 0 and row["plain_seconds"] > 0, row
        assert ("predicted_bytes" in row) == ("predicted_overhead" in row) == (row["way"] == "streamed")
    assert capsys.readouterr().out.count("| tiny.py:net | 64 | float32 |") == 5


@pytest.mark.usefixtures("in_this_process")
def test_rows_say_in_which_memory_format_they_were_measured(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_in_faster_format", lambda case: replace(case, channels_last=True))
    rows = bench.bench(bench.Case(model, 64, "forward", "float32", "cpu"), ["32MiB"], repeats=1)
    assert [row["channels_last"] for row in rows] == [True, True]


@pytest.mark.usefixtures("in_this_process")
def test_plain_pytorch_that_does_not_fit_is_a_row(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(Here):
        def ask(self) -> Any:
            if self.way.how == "plain":
                raise DoesNotFit("the system ended the process")
            return super().ask()

    monkeypatch.setattr(bench, "Process", Small)
    monkeypatch.setattr(bench, "memory_of", lambda device: 64 << 20)
    case = bench.Case(model, 64, "forward", "float32", "cpu")
    plain, streamed = bench.bench(case, ["1/2"], repeats=1)
    assert not plain["fits"] and plain["way"] == "plain"
    assert streamed["fits"] and streamed["way"] == "streamed" and streamed["budget"] == 32 << 20
    assert streamed["seconds"] > 0 and streamed["time_ratio"] is None
    shown = bench.table_row({**asdict(case), **plain})
    assert shown == "| tiny.py:net | 64 | float32 | forward | plain |  | does not fit |  |  |  |  |  |  |"


def test_a_process_answers_line_by_line_and_tells_why_it_ended() -> None:
    answering = """
import sys
print("a warning", file=sys.stderr)
for k, _ in enumerate(sys.stdin):
    print([k, 2] if k < 2 else '{"too_large": "no memory"}', flush=True)
"""
    process = Process(["-c", answering])
    process.close()  # was never asked
    process = Process(["-c", answering])
    assert [process.ask(), process.ask()] == [[0, 2], [1, 2]]
    with pytest.raises(DoesNotFit, match="no memory"):
        process.ask()
    process.close()
    answer_once = "import os; input(); print(1, flush=True); "
    for code, answers, error, told in (
        ("1 / 0", 0, RuntimeError, "ZeroDivisionError"),
        ("import os; os.kill(os.getpid(), 9)", 0, DoesNotFit, "system"),
        (f"{answer_once} 1 / 0", 1, RuntimeError, "ZeroDivisionError"),
        (f"{answer_once} os.kill(os.getpid(), 9)", 1, DoesNotFit, "system"),
    ):
        process = Process(["-c", code])
        assert [process.ask() for _ in range(answers)] == [1] * answers
        with pytest.raises(error, match=told):
            process.ask()
        process.close()


def test_a_pass_that_does_not_fit_leaves_no_tensors() -> None:
    def work() -> None:
        tensor = torch.empty(8)
        held.append(weakref.ref(tensor))
        torch.empty(1 << 60, dtype=torch.uint8)

    held: list[weakref.ref[torch.Tensor]] = []
    with pytest.raises(DoesNotFit):
        timed(work, torch.device("cpu"))
    assert held[0]() is None


def test_passes_without_memory_are_left_out_and_the_others_measured() -> None:
    def seconds(size: int) -> tuple[float, int | None]:
        return timed(lambda: torch.empty(size, dtype=torch.uint8), torch.device("cpu"))

    found = measure({"large": lambda: seconds(1 << 60), "small": lambda: seconds(1)}, repeats=3)
    assert not found["large"].fits and found["large"].median is None
    assert found["small"].fits and len(found["small"].seconds) == 3
    with pytest.raises(RuntimeError, match="mat1 and mat2"), memory_errors():
        torch.empty(2, 3) @ torch.empty(2, 3)


def test_no_pass_but_the_first_begins_after_the_limit() -> None:
    calls: list[str] = []

    def run(name: str) -> tuple[float, int | None]:
        calls.append(name)
        return 1.0, None

    found = measure({name: partial(run, name) for name in "ab"}, warm_ups=1, limit=0.0)
    assert calls == ["a", "b"] and all(len(one.seconds) == 1 for one in found.values())


def _refuse(enable: bool = True) -> None:
    assert not enable, "gradient checkpointing not supported"  # as timm says it


@pytest.mark.parametrize("refuses", [False, True])
def test_the_copy_with_checkpoints_has_the_same_gradients(model: str, refuses: bool) -> None:
    net: Any = bench.Case(model, 64, "step", "float32", "cpu").network()
    if refuses:
        net.set_grad_checkpointing = _refuse
    ways, image, grads = Ways(net.double()), torch.rand(1, 3, 40, 40, dtype=torch.float64), []
    for how in ("plain", "checkpoint"):
        run: Any = ways.run(Way(how))
        one_pass(run, run, image, "step", "float32")
        grads.append([weight.grad for weight in run.parameters()])
    assert run is not net and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    blocks = [part for part in run.modules() if isinstance(part, nn.Sequential) and "forward" in vars(part)]
    assert len(blocks) == 2


def test_the_largest_size_is_found_to_a_tenth() -> None:
    for most in (33, 700, 1000, 5000):
        low, high = largest_size(lambda size, most=most: size <= most, 1024)
        assert low <= most < high and (high <= 1.1 * low or high - low <= 32), (most, low, high)
    assert largest_size(lambda size: False, 1024) == (0, 32)


@pytest.mark.parametrize("most", [1000, 2000])
def test_the_largest_images_are_told_of_plain_and_streamed_passes(
    model: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peaks(case: bench.Case, kinds: list[Way], warm_up: float) -> dict[Way, int | None]:
        return {way: 1 if case.size <= (1000 if way.how == "plain" else most) else None for way in kinds}

    monkeypatch.setattr(bench, "peaks_of", peaks)
    monkeypatch.setattr(bench, "_LARGEST", 4096)
    plain, tried, *planned = bench.largest(bench.Case(model, 512, "step", "float32", "cpu"))
    assert plain["way"] == "plain" and 900 <= plain["size"] <= 1000 < plain["too_large"]
    assert tried["way"] == "streamed" and tried["size"] == 2 * plain["size"] and tried["fits"] == bool(planned)
    assert bool(planned) == (most == 2000)
    for row in planned:
        assert row["way"] == "streamed, by its plan" and row["size"] >= 4096 and row["predicted_bytes"] > 0


def test_a_budget_is_a_share_or_bytes() -> None:
    texts = ("1/4", "0.4", "1", "1.0", "2KiB", "5000")
    assert [bench._bytes(text, 1000) for text in texts] == [250, 400, 1000, 1000, 2048, 5000]
    for text in ("1/0", "0.0", "1/2MiB", "half"):
        with pytest.raises(ValueError, match=text):
            bench._bytes(text, 1000)


@pytest.mark.usefixtures("in_this_process")
def test_what_cannot_be_measured_is_told_before_anything_runs(model: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "other.py").write_text("from torch import nn\nnet = nn.ReLU()\n")
    for arguments, told in (
        (["--model", f"{tmp_path}/other.py:net"], "no weights that train"),
        (["--model", model, "--json", str(tmp_path)], "Is a directory"),
        (["--model", model, "--json", f"{tmp_path}/other.py/new.json"], "other.py"),
        (["--model", model, "--largest", "--budget", "1/2"], "leave one out"),
    ):
        assert main(["bench", *arguments]) == 2
        shown = capsys.readouterr()
        assert told in " ".join(shown.err.split()) and "|" not in shown.out, shown


@pytest.mark.usefixtures("in_this_process")
def test_a_network_that_fails_leaves_the_others_their_rows(model: str, tmp_path: Path, capsys: Any) -> None:
    file, to = tmp_path / "gray.py", tmp_path / "new.json"
    file.write_text(
        f"{MODEL}\n\ndef gray():\n    return nn.Conv2d(1, 4, 3)\n\n\ndef broken():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), "
        "nn.Conv2d(5, 4, 3))\n"
    )
    names = [f"{file}:{name}" for name in ("broken", "gray")]
    arguments = [*("--model", names[0], "--model", names[1], "--size", "64"), "--repeats", "1", "--json", str(to)]
    assert main(["bench", *arguments, "--budget", "1KiB"]) == 1
    rows = json.loads(to.read_text())["rows"]
    found = [(row["model"], row["what"], row["way"], row["fits"]) for row in rows]
    assert found == [
        *((names[0], what, "", False) for what in ("step", "forward")),
        *((names[1], what, way, way == "plain") for what in ("step", "forward") for way in ("plain", "streamed")),
    ]
    told = " ".join(capsys.readouterr().err.split())
    assert "expected input" in told and "smallest" in told, told  # of PyTorch, and of the plan


def test_peers_are_those_that_run_the_network_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    dense, flat = (
        nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU()), nn.Conv2d(4, 1, 1)),
        nn.Conv2d(3, 4, 1),
    )
    assert [way.how for way in peers(dense, (1, 1, 640, 640), "forward")] == ["sliding window"]
    assert [way.how for way in peers(dense, (1, 1, 640, 640), "step")] == ["checkpoint"]
    assert peers(dense, (1, 1, 512, 512), "forward") == peers(flat, (1, 3, 640, 640), "step") == []


@pytest.mark.usefixtures("in_this_process")
def test_processes_that_fill_the_memory_follow_one_another(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, asked = bench.Case(model, 64, "forward", "float32", "cpu"), list[str]()

    class Noted(Here):
        def ask(self) -> Any:
            asked.append(self.way.how)
            return super().ask()

    monkeypatch.setattr(bench, "Process", Noted)
    monkeypatch.setattr(bench, "available_memory", lambda: 1 << 30)
    kinds, ways = [Way(), Way("streamed")], Ways(case.network())
    for peak, order in ((1 << 20, ["plain", "streamed"] * 2), (1 << 30, ["plain"] * 2 + ["streamed"] * 2)):
        asked.clear()
        rows = bench.in_turn(case, ways, kinds, 1, peak)
        assert asked == order and [row["way"] for row in rows] == ["plain", "streamed"]


@pytest.mark.slow
def test_a_peak_of_a_process_of_its_own_is_that_of_the_largest_pass(model: str) -> None:
    case = bench.Case(model, 1024, "step", "float32", "cpu")
    peaks = bench.peaks_of(case, [Way(), Way("streamed", 16 << 20)])
    assert (peaks[Way()] or 0) > 8 << 20 and (peaks[Way("streamed", 16 << 20)] or 0) < (peaks[Way()] or 0)


@pytest.fixture(scope="module")
def page() -> Any:
    """The script that writes docs/benchmarks.md."""
    spec = importlib.util.spec_from_file_location("benchmarks_page", ROOT / "benchmarks" / "page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_benchmarks_agrees_with_the_files_of_results(page: Any) -> None:
    text = page.page()
    assert text == page.PAGE.read_text(encoding="utf-8"), "run: uv run python benchmarks/page.py"
    shown = page.RESULTS.findall((page.FOLDER / "page.md").read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(f"results/{file.name}" for file in (page.FOLDER / "results").glob("*.json"))


def test_a_file_of_results_becomes_tables(page: Any, tmp_path: Path) -> None:
    row = {"model": "torchvision/net", "size": 64, "dtype": "bfloat16", "what": "step", "fits": True, "seconds": 2.0}
    rows = [
        {**row, "way": "plain", "bytes": 4 << 20, "time_ratio": 1.0, "memory_ratio": 1.0},
        {
            **{**row, "way": "streamed", "share": "1/4", "bytes": 1 << 20, "predicted_bytes": 2 << 20, "mark": 1.05},
            "all_seconds": [2.0, 1.5, 2.5],
        },
        {**row, "way": "streamed", "budget": 3 << 20, "fits": False, "carries": "host"},
        {**row, "way": "plain", "what": "largest", "cap": 40 << 30, "size": 8192},
        {"what": "failed", "reason": "RuntimeError"},
    ]
    head = {"machine": "M", "device": "G", "threads": 4, "torch": "2.11", "date": "2026-11-27", "command": "c"}
    (tmp_path / "new.json").write_text(json.dumps({**head, "rows": rows}))
    assert page.tables(tmp_path / "new.json").splitlines() == [
        *("`c`", "2026-11-27, G, M, 4 threads, torch 2.11.", "", *bench.HEADER),
        "| net | 64 | bfloat16 | step | plain |  | 2.000 | 1.00 |  | 4 | 1.00 |  |  |",
        "| net | 64 | bfloat16 | step | streamed | 1/4 | 2.000 (1.50 to 2.50) |  |  | 1 |  | 2 | at most 1.05 |",
        "| net | 64 | bfloat16 | step | streamed, carries on the host | 3 MiB | does not fit |  |  |  |  |  |  |",
        *("", "| largest step | dtype | way | memory | pixels | s | planned MiB |", "|---|---|---|---|---|---|---|"),
        "| torchvision/net | bfloat16 | plain | 40.00 GiB | 8192 | 2.0 |  |",
    ]
