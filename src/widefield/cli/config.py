"""`widefield config`: arguments."""

import argparse
import sys
from pathlib import Path

from widefield.cli.user_code import add_imports, import_user_code

LIGHT = True
TAKES_OTHERS = True
EPILOG = """\
path=value, such as model.backbone.depth=34 or trainer.max_epochs=3, goes over the files; a value is YAML.

print shows the whole configuration, with what it is based on. check compares every value with the constructor that gets it, and
makes all but the data sets once: model, metrics, transforms, optimizer, schedule, trainer. No data is read.
Exit code: 0 fine, 1 something is wrong with the configuration, 2 another error such as a file that is not there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.usage = f"{parser.prog} {{print,check}} FILE [FILE ...] [--imports FILE] [path=value ...]"
    parser.add_argument("what", choices=("print", "check"), help="show it, or see whether it can be used")
    parser.add_argument("file", metavar="FILE", help="YAML or Python file; of several, each goes over the last")
    add_imports(parser)


def run(arguments: argparse.Namespace, others: list[str]) -> int:
    """Print or check the configuration."""
    from widefield.cli.fit_sections import SECTIONS
    from widefield.config import ConfigError, check_config, load, override, write_yaml

    flags = [text for text in others if text.startswith("--") and "=" not in text]
    if flags:
        raise ValueError(f"there is no {flags[0]} here; values are given as path=value, as in data.images=slides")
    files = [Path(arguments.file), *(Path(text) for text in others if "=" not in text)]
    try:
        config = load(*files)
        import_user_code([*(config.data.get("imports") or []), *arguments.imports])
        config = override(config, (text for text in others if "=" in text), SECTIONS)
        if arguments.what == "print":
            print(write_yaml(config.data), end="")
            return 0
        from widefield.cli.trial import try_out

        check_config(config, SECTIONS)
        try_out(config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{files[-1]}: nothing wrong")
    return 0
