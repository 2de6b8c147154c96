"""Seconds and peak memory of passes through a network: what `widefield bench` and the scripts in benchmarks/ measure with."""

import datetime
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from widefield.errors import WidefieldError
from widefield.reports.memory import PeakMemory, status_bytes
from widefield.writing import replacing

K = TypeVar("K")
Timed = tuple[float, int | None]  # the seconds of a pass, and the bytes at its peak where they are known


class DoesNotFit(WidefieldError, MemoryError):
    """A pass needs more memory than there is."""


@dataclass(frozen=True)
class Measured:
    """Seconds of the passes of one kind in their order, and the bytes at their peaks where they are known, warm-ups left out.

    `cold`: there was no time but for warm-ups, of which the last is here. `reason`: why it does not fit.
    """

    seconds: tuple[float, ...] = ()
    peaks: tuple[int, ...] = ()
    fits: bool = True
    cold: bool = False
    reason: str = ""

    @property
    def median(self) -> float | None:
        """Median of the seconds; None where nothing was measured."""
        return statistics.median(self.seconds) if self.seconds else None


def measure(
    passes: Mapping[K, Callable[[], Timed]],
    *,
    warm_ups: int = 1,
    repeats: int = 3,
    limit: float = math.inf,
) -> dict[K, Measured]:
    """Run `passes` in turn, `warm_ups` rounds and then `repeats`, and keep what all but the warm-ups return, as `timed` does.

    After `limit` seconds no pass begins, other than the first ones: where nothing else was measured, the last warm-up counts.
    Passes of a kind that does not fit are left out from then on.
    """
    begin = time.perf_counter()
    found: dict[K, list[Timed]] = {name: [] for name in passes}
    too_large = dict[K, str]()
    for turn in range(warm_ups + repeats):
        for name, run in passes.items():
            if name in too_large or (turn > 0 and time.perf_counter() - begin > limit):
                continue
            try:
                found[name].append(run())
            except DoesNotFit as error:
                too_large[name] = str(error)
    return {
        name: Measured(fits=False, reason=too_large[name]) if name in too_large else _summed_up(of, warm_ups)
        for name, of in found.items()
    }


def _summed_up(passes: list[Timed], warm_ups: int) -> Measured:
    kept = passes[warm_ups:] or passes[-1:]
    peaks = tuple(peak for _, peak in kept if peak is not None)
    return Measured(tuple(seconds for seconds, _ in kept), peaks, cold=len(passes) <= warm_ups)


def timed(work: Callable[[], object], device: torch.device) -> Timed:
    """Return the seconds of `work`, and on CUDA the bytes at its peak above those that were allocated before.

    Raises:
        DoesNotFit: memory is short; what is cached has been given back.
    """
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    begin = time.perf_counter()
    try:
        with memory_errors():
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except DoesNotFit:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        raise
    seconds = time.perf_counter() - begin
    return seconds, torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def peak_of(work: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the bytes at the peak of `work` above what is in use before.

    On CUDA they are those that PyTorch allocates, else those that are resident: call it in a process of its own, after a warm-up.
    """
    memory = PeakMemory(torch.device(device))
    work()
    return bytes_at_peak(memory)


def bytes_at_peak(memory: PeakMemory) -> int:
    """Return the bytes at the peak so far; raises OSError where the system does not tell them."""
    peak = memory.bytes_above_start()
    if peak is None:
        raise OSError("this system does not tell the peak memory of a process; measure on Linux, or on a GPU")
    return peak


_MEMORY_WORDS = ("allocate memory", "out of memory", "could not create a primitive")  # the last is oneDNN's


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise DoesNotFit in place of what PyTorch raises where memory is short."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        kinds = (torch.OutOfMemoryError, MemoryError)
        if not isinstance(error, kinds) and not any(words in str(error) for words in _MEMORY_WORDS):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors
        raise DoesNotFit(str(error)) from None


def memory_of(device: torch.device) -> int:
    """Return the bytes of the memory of a CUDA device, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Return the bytes that processes can have, without others being ended for them; elsewhere than on Linux all of the machine."""
    return (
        status_bytes("MemAvailable", Path("/proc/meminfo"))
        if sys.platform == "linux"
        else memory_of(torch.device("cpu"))
    )


def limit_memory() -> None:
    """On Linux, let this process have no more memory than is free: it gets an error then, and is not ended by the system."""
    if sys.platform == "linux":
        import resource

        limit, (_, hard) = status_bytes("VmData") + available_memory(), resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def largest_size(fits: Callable[[int], bool], start: int) -> tuple[int, int]:
    """Return the largest size that `fits`, to 10%, and the smallest that was seen not to; 0 for the first if nothing does."""
    low, high, size = 0, 0, start
    while size >= 32 and (not high or high > 1.1 * low):
        if fits(size):
            low = size
        else:
            high = size
        size = 2 * low if not high else (low + high) // 64 * 32 if low else high // 2
        if size in (low, high):
            break
    return low, high


class Process:
    """Python, run with the arguments `command` from the first question on: it answers each line that it is sent with one of JSON.

    A pass leaves the C library's heap in a state on which the time of the next one depends, of whatever network: what takes turns
    is in processes of its own.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command, self._stack = [sys.executable, *command], ExitStack()
        self._errors = self._stack.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115  (closed by the stack)
        self._running: subprocess.Popen[bytes] | None = None

    def ask(self) -> Any:
        """Return the next answer.

        Raises:
            DoesNotFit: the answer says why it is `too_large`, or the system ended the process that takes most memory.
            RuntimeError: it failed.
        """
        if self._running is None:
            pipe = subprocess.PIPE
            self._running = self._stack.enter_context(  # without a buffer, which would be written when it is closed
                subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=self._errors, bufsize=0)
            )
            self._stack.callback(self._running.kill)
        assert self._running.stdin and self._running.stdout
        with suppress(BrokenPipeError):  # it has ended, of which there is more to tell
            self._running.stdin.write(b"\n")
        if line := self._running.stdout.readline():
            answer = json.loads(line)
            if isinstance(answer, dict) and "too_large" in answer:
                self.close()  # and give back what memory it has
                raise DoesNotFit(answer["too_large"])
            return answer
        if self._running.wait() == -9:
            raise DoesNotFit("the system ended the process")
        self._errors.seek(0)
        raise RuntimeError(f"`{' '.join(self._command)}` failed:\n{self._errors.read()}")

    def close(self) -> None:
        """End the process."""
        self._stack.close()


def peak_in_new_process(peak: str) -> Any:
    """Return what this script prints last, as JSON, when it is run with its own arguments and `--peak PEAK`.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, *sys.argv, "--peak", peak]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: torch.device | str) -> dict[str, Any]:
    """Return what a result has to name: processor and its vector instructions, device, cores, versions and the date."""
    return {
        "machine": f"{_processor()} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, {platform.system()}",
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write `data` to `path`, which is complete at any time: an earlier version, or this one."""
    with replacing(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n")
