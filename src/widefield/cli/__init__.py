"""The command `widefield`. Nothing heavy is imported before a verb runs."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from widefield.cli.messages import told
from widefield.cli.verb import Verb
from widefield.cli.verbs import VERBS
from widefield.registry import import_module_or_file, import_object

_TUNABLE = "glibc.malloc.tcache_count"
_BROKEN_PIPE = 141
"""Exit code of what shells see end by SIGPIPE."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default that of the process); returns the exit code.

    0 is success; 1 that of a check that failed; 2 an error of the user's, shown in a line; 130 an interruption.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in VERBS:
        _parser().parse_args(argv)
        _parser().print_help()
        return 0
    name, *rest = argv
    parser = argparse.ArgumentParser(
        prog=f"widefield {name}",
        description=VERBS[name].description,
        epilog=VERBS[name].epilog,
        usage=VERBS[name].usage,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--verbose", action="store_true", help="show debug messages, and the traceback of an error")
    parser.set_defaults(verb=name)
    _declare(parser, VERBS[name])
    arguments, others = parser.parse_known_args(rest)
    verb: Verb = arguments.chosen
    if others and not verb.takes_others:
        parser.error(f"unknown arguments: {' '.join(others)}")

    def run() -> Any:
        for place in getattr(arguments, "imports", ()):
            import_module_or_file(place)
        return import_object(verb.run)(arguments, others)

    if verb.light:
        return _run_light(run, arguments)
    if code := _run_light(lambda: import_object(verb.check)(arguments, others), arguments):
        return code
    from widefield.cli.run import run_verb

    return run_verb(run, arguments)


def _declare(parser: argparse.ArgumentParser, verb: Verb) -> None:
    parser.set_defaults(chosen=verb)
    for name, options in verb.arguments:
        parser.add_argument(name, **options)
    if verb.parts:
        parts = parser.add_subparsers(dest="part", required=True, metavar="PICTURE")
        for name, part in verb.parts.items():
            _declare(parts.add_parser(name, help=part.summary, description=part.description, allow_abbrev=False), part)


def script() -> int:
    """The installed command: `main` in an environment that suits it."""
    _set_up_environment()
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, as in `widefield list models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return _BROKEN_PIPE


def _run_light(run: Callable[[], Any], arguments: argparse.Namespace) -> int:
    """Run a verb that has to answer at once: no logging, and nothing imported that it does not need itself."""
    try:
        return int(run() or 0)
    except (OSError, ValueError) as error:
        if arguments.verbose or isinstance(error, BrokenPipeError):
            raise
        print(f"widefield {arguments.verb}: error: {told(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _set_up_environment() -> None:
    """Set the variables that torch or the C library read at their start, unless the user has set them.

    Where the C library must know one from its start, the process begins again, once.
    """
    # OpenMP's threads spin while they wait, which slows torch down many times when another process wants one of the cores. Those of
    # GNU spin for some microseconds: going to sleep after each operation would take a third of the time of short ones.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    # Large blocks of memory get huge pages: a step brings the same memory into use many times, page by page otherwise.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE not in tunables and _glibc() < (2, 38):  # see widefield.streaming.heap
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{_TUNABLE}=0")))
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _glibc() -> tuple[int, ...]:
    """Return the version of the GNU C library, a very high one where the system has another."""
    try:
        _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()  # "glibc 2.36"
        return tuple(int(part) for part in version.split("."))
    except (AttributeError, ValueError, OSError):
        return (sys.maxsize,)


def _parser() -> argparse.ArgumentParser:
    from widefield import __version__

    verbs = "\n".join(f"  {name:<10}{verb.summary}" for name, verb in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="widefield",
        description="Train and run vision models on images of any size, exactly, in the memory you have.",
        epilog=f"verbs:\n{verbs}\n\n`widefield VERB --help` shows the arguments of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"widefield {__version__}")
    parser.add_argument("verb", choices=VERBS, nargs="?", metavar="VERB", help="what to do, see below")
    return parser
