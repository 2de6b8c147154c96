"""What the benchmarks share: peak memory of this process, and a script run again in a process of its own to measure it."""

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak_of(work: Callable[[], object]) -> int:
    """Bytes at the resident high-water mark of `work`, above what is resident before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(field))) * 1024


def peak_in_new_process(peak: str) -> Any:
    """What this script prints last, as JSON, when it is run with its own arguments and `--peak PEAK`."""
    command = [sys.executable, *sys.argv, "--peak", peak]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
