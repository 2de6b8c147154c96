"""Settings that must stand in the environment before torch is loaded, or even before the process starts."""

import os
import sys

_TUNABLE = "glibc.malloc.tcache_count"


def set_up() -> None:
    """Set what the user has not set. Where the C library must know it from its start, the process begins again, once."""
    # OpenMP's threads spin while they wait, which slows torch down thirtyfold when another process wants one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE not in tunables and _glibc() < (2, 38):  # see widefield.streaming.heap
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_TUNABLE}=0")))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _glibc() -> tuple[int, ...]:
    """The version of the GNU C library, a very high one where the system has another."""
    try:
        _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()  # "glibc 2.36"
        return tuple(int(part) for part in version.split("."))
    except (AttributeError, ValueError, OSError):
        return (sys.maxsize,)
