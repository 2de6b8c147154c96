"""Keeps the C library's heap within a memory budget.

glibc leaves what a program frees resident for the next request. When a budget requires it, all that is free is given back
between two steps. Before version 2.38 it also caches the remainders of aligned blocks, which keeps their free neighbours apart:
large blocks find no room between them, and the heap grows, by several times what a step needs. The environment variable
GLIBC_TUNABLES=glibc.malloc.tcache_count=0, which only the start of a process can set, ends that; the command line sets it.
Where such a glibc was started without it, a pass that is to fill more than half of its budget lets large blocks have pages of their
own, which go back when they are freed, and cost time because they come back one by one.
"""

import ctypes
import logging
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_STATM = Path("/proc/self/statm")
_ENVIRON = Path("/proc/self/environ")  # as the process was started with
_OWN_PAGES = 1 << 20
"""Bytes from which a block gets pages of its own. Measured: a step with 138 MiB in use at its peak had 480 MiB, and 151 so."""
_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_logger = logging.getLogger(__name__)


@dataclass
class Heap:
    """Watches one pass that may add `budget` bytes to the `in_use` on the heap when it began.

    Free memory is given back where the process has more than `limit` bytes after a step: where less than `margin` is left, for the
    next step has other blocks, of which some find no room in what is free.
    """

    budget: int
    margin: int
    in_use: int
    limit: int

    def trim(self) -> None:
        """Give free memory back if the process is above the limit; to be called between steps."""
        library = _glibc()
        if library is None or _resident() <= self.limit:
            return
        if _caches_remainders():
            _give_pages_of_their_own(library)
        library.malloc_trim(0)
        resident, grown = _resident(), _in_use(library) - self.in_use
        # What was free and not resident when the pass began had been taken for memory that could be given back. And where more is
        # in use than was foreseen, elsewhere in the process, room is left for a step, or each would trim.
        self.limit = max(resident - grown + self.budget - self.margin, resident + self.margin)
        _tell_once()


def watch(budget: int, margin: int, planned: int = 0) -> Heap | None:
    """A heap that is trimmed when less than `margin` bytes are left of a `budget` in bytes beyond what is in use now.

    `planned` are the bytes that the pass is expected to need.

    None where the system or its C library gives no hold of the heap.
    """
    library = _glibc()
    if library is None or not _STATM.exists():
        return None
    if planned > budget // 2 and _caches_remainders():
        _give_pages_of_their_own(library)
    return Heap(budget, margin, _in_use(library), _resident() - library.mallinfo2().fordblks + budget - margin)


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


@cache
def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is a glibc whose heap can be asked and trimmed."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallinfo2") and hasattr(library, "malloc_trim")):
        return None
    library.mallinfo2.restype = _Mallinfo2
    return library


@cache
def _give_pages_of_their_own(library: ctypes.CDLL) -> None:
    """Let large blocks have pages of their own from now on, in the whole process."""
    library.mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)


def _in_use(library: ctypes.CDLL) -> int:
    """Bytes that the program has of the heap, blocks with pages of their own included."""
    found = library.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(_STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@cache
def _caches_remainders() -> bool:
    """True if the C library keeps free neighbours of aligned blocks apart."""
    try:
        _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()  # "glibc 2.36"
        numbers = tuple(int(part) for part in version.split("."))
        return numbers < (2, 38) and b"glibc.malloc.tcache_count=0" not in _ENVIRON.read_bytes()
    except (AttributeError, ValueError, OSError):
        return False


@cache
def _tell_once() -> None:
    if _caches_remainders():
        _logger.warning(
            "To stay within memory_budget, free memory is given back to the system, which takes time. With a glibc before 2.38 it "
            "need not be: start Python with the environment variable GLIBC_TUNABLES=glibc.malloc.tcache_count=0"
        )
