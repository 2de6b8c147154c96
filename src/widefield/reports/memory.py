"""Peak memory of this process, and what a plain training step would keep."""

import contextlib
import copy
import ctypes
import gc
import logging
from pathlib import Path

import torch
from torch import Tensor, nn

_log = logging.getLogger(__name__)
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak memory since this object was made, above what was in use then.

    On CUDA, of the tensors on the current device. Otherwise the resident memory of the process, on Linux alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._start: int | None
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
            self._start = torch.cuda.memory_allocated(self._cuda)
        else:
            self._start = _reset_peak()

    def bytes_above_start(self) -> int | None:
        """The peak so far minus what was in use at the start; None where the system does not tell."""
        if self._start is None:
            return None
        if self._cuda is not None:
            return torch.cuda.max_memory_allocated(self._cuda) - self._start
        return status_bytes("VmHWM") - self._start


def _reset_peak() -> int | None:
    """Make the kernel forget the peak so far (man 5 proc: writing 5 to clear_refs); the memory in use now."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory, which would count as in use
    try:
        _CLEAR_REFS.write_text("5")
        return status_bytes("VmRSS")
    except OSError:
        _log.debug("this system does not tell the peak memory of a process")
        return None


def memory_in_use(device: torch.device) -> int | None:
    """Return the bytes in use: of tensors on a CUDA `device`, of this process otherwise; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return status_bytes("VmRSS") if _STATUS.exists() else None


def status_bytes(field: str, file: Path = _STATUS) -> int:
    """Return a number of bytes that Linux tells of this process, or in another file of that form."""
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def plain_step_bytes(module: nn.Module, shape: tuple[int, int, int]) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of `module` run on a whole image of `shape` (C, H, W).

    Counted, not measured: the module runs on the meta device, which computes shapes and no pixels. Each storage counts
    once; parameters and buffers don't count. A real step needs more (gradients, workspace), so this is a lower bound.
    """
    twin = copy.deepcopy(module).to("meta").eval()
    own = {_storage(tensor) for tensor in (*twin.parameters(), *twin.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor
        return tensor

    parameter = next(twin.parameters())
    image = torch.empty((1, *shape), device="meta", dtype=parameter.dtype)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        twin.requires_grad_(True)(image)
    kept.pop(_storage(image), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
