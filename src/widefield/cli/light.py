"""Run a verb that has to answer at once: no logging, and nothing imported that it does not need itself."""

import argparse
import sys
from types import ModuleType


def run_light(verb: str, module: ModuleType, arguments: argparse.Namespace, others: list[str]) -> int:
    """Run `module.run(arguments, others)`; the exit code, which is what it returns, or 0."""
    try:
        return int(module.run(arguments, others) or 0)
    except (OSError, ValueError) as error:
        if arguments.verbose or isinstance(error, BrokenPipeError):
            raise
        print(f"widefield {verb}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
