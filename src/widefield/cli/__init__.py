"""The command `widefield`. Nothing heavy is imported before a verb runs."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

VERBS = {
    "fit": "train a classifier on whole images with one label each",
    "pretrain": "train a model on images without labels, by a self-supervised method",
    "export": "write the trained model of a checkpoint of `pretrain` to a file of its own",
    "embed": "write the embeddings of images by a checkpoint of `pretrain`",
    "validate": "compute the metrics of a trained model on its validation images",
    "test": "compute the metrics of a trained model on its test images",
    "predict": "classify images with a checkpoint, and show where the evidence lies",
    "visualize": "draw where a class was seen, how features lie, how a learning rate goes, what is mistaken for what",
    "check": "see whether a model streams exactly, and what a large image would need",
    "plan": "show the tile, steps and memory that an image of some size takes, and the geometry of every layer",
    "list": "list models, components, methods of pretraining or ready configurations by name",
    "help": "show the arguments of a component, with their types, defaults and docs",
    "config": "show a configuration with all that it is based on, or check it",
    "demo": "make a small set of large images, train on them, predict, and write a report",
}

_FILES = {"list": "listing", "help": "component_help", "validate": "test"}
"""Modules of verbs that are not named after them: names of builtins, which an imported module would hide here, and `validate`."""
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
    verb, *rest = argv
    module = importlib.import_module(f"widefield.cli.{_FILES.get(verb, verb)}")
    parser = argparse.ArgumentParser(
        prog=f"widefield {verb}",
        description=f"{VERBS[verb][0].upper()}{VERBS[verb][1:]}.",
        epilog=module.EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--verbose", action="store_true", help="show debug messages, and the traceback of an error")
    parser.set_defaults(verb=verb)
    module.add_arguments(parser)
    arguments, others = parser.parse_known_args(rest)
    if others and not module.TAKES_OTHERS:
        parser.error(f"unknown arguments: {' '.join(others)}")
    if getattr(module, "LIGHT", False):
        return _run_light(verb, module, arguments, others)
    from widefield.cli.run import run_verb

    return run_verb(verb, module, arguments, others)


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


def _run_light(verb: str, module: ModuleType, arguments: argparse.Namespace, others: list[str]) -> int:
    """Run a verb that has to answer at once: no logging, and nothing imported that it does not need itself."""
    try:
        return int(module.run(arguments, others) or 0)
    except (OSError, ValueError) as error:
        if arguments.verbose or isinstance(error, BrokenPipeError):
            raise
        print(f"widefield {verb}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _set_up_environment() -> None:
    """Set the variables that torch or the C library read at their start, unless the user has set them.

    Where the C library must know one from its start, the process begins again, once.
    """
    # OpenMP's threads spin while they wait, which slows torch down thirtyfold when another process wants one of the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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

    verbs = "\n".join(f"  {verb:<10}{summary}" for verb, summary in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="widefield",
        description="Train and run vision models on images of any size, exactly, in the memory you have.",
        epilog=f"verbs:\n{verbs}\n\n`widefield VERB --help` shows the arguments of a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"widefield {__version__}")
    parser.add_argument("verb", choices=VERBS, nargs="?", metavar="VERB", help="what to do, see below")
    return parser
