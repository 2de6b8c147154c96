"""Keeps the C library's heap within a memory budget.

glibc leaves what a program frees resident for the next request. Small remainders of aligned blocks keep free neighbours apart, so
large blocks find less and less room between them and the heap grows, by several times what a step needs. Giving free pages back
costs time (they come back zeroed, one by one), so it is done only when the budget requires it.

With GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0 in the environment, which only the start of a process can set,
the heap hardly grows at all.
"""

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is a glibc (2.33 or later) whose heap can be asked and trimmed."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallinfo2") and hasattr(library, "malloc_trim")):
        return None
    library.mallinfo2.restype = _Mallinfo2
    return library


def _resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Heap:
    """Watches one pass. Free memory is given back at `limit` bytes of the process; in one step the heap grows by up to `margin`."""

    limit: int
    margin: int

    def trim(self) -> None:
        """Give free memory back if the process is above the limit; to be called between steps."""
        library = _glibc()
        if library is not None and _resident() > self.limit:
            library.malloc_trim(0)
            # Where more is in use than was foreseen, elsewhere in the process: leave room for a step, or each would trim.
            self.limit = max(self.limit, _resident() + self.margin)


def watch(budget: int, margin: int) -> Heap | None:
    """A heap that is trimmed when less than `margin` bytes are left of a `budget` in bytes beyond what is in use now.

    None where the system or its C library gives no hold of the heap.
    """
    library = _glibc()
    if library is None or not os.path.exists("/proc/self/statm"):
        return None
    return Heap(_resident() - library.mallinfo2().fordblks + budget - margin, margin)
