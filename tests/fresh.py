"""Tests that need an interpreter of their own: one that forks must not have differentiated, or used libvips, before."""

import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_code(code: str, folder: Path = ROOT) -> str:
    """Run `code` in `folder`, in a new interpreter; what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def fresh(test: Callable[..., None]) -> Callable[..., None]:
    """Make `test` run in a new interpreter; its arguments must be picklable."""

    @functools.wraps(test)
    def in_process(**arguments: Any) -> None:
        given = pickle.dumps(arguments)
        run_code(
            "import pickle, torch\n"
            "torch.set_num_threads(1)\n"  # as a pool of threads does not survive a fork
            f"from {test.__module__} import {test.__name__} as test\n"
            f"test.__wrapped__(**pickle.loads({given!r}))"
        )

    return in_process
