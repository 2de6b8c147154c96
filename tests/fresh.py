"""Tests that need a process of their own: one that forks must not have differentiated, or used libvips, before."""

import functools
import importlib
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # where a process finds the module of its test
SERVER = multiprocessing.get_context("forkserver")
"""Forks processes from one that has imported the library, which takes seconds, and has run nothing."""
SERVER.set_forkserver_preload(["widefield.components", "widefield.pretraining.training"])


def run_code(code: str, folder: Path = ROOT) -> str:
    """Run `code` in `folder`, in a new interpreter; what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def fresh(test: Callable[..., None]) -> Callable[..., None]:
    """Make `test` run in a process in which nothing ran before; its arguments must be picklable."""

    @functools.wraps(test)
    def in_process(**arguments: Any) -> None:
        with ProcessPoolExecutor(1, SERVER) as pool:
            pool.submit(_run, test.__module__, test.__name__, arguments).result()

    return in_process


def _run(module: str, name: str, arguments: dict[str, Any]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # as a pool of threads does not survive a fork
    test: Any = getattr(importlib.import_module(module), name)
    test.__wrapped__(**arguments)
