"""Configurations in YAML and Python: read, merged, changed from the command line, checked, and built.

Text in, plain data out: `load` reads a file with its bases, `override` lays `path=value` over it, `check_config` compares every
value with the constructor it is meant for, `build` makes the model, `write_yaml` writes it all down again.
"""

from widefield.config.check import (
    Mismatch,
    Problem,
    check_arguments,
    check_description,
    check_value,
    checked,
    find_class,
)
from widefield.config.config import Config, ConfigError, Origin, build, dotted
from widefield.config.load import load, read_yaml, ready_configs, write_yaml
from widefield.config.merge import merge
from widefield.config.overrides import override
from widefield.config.sections import Foreign, Section, Sections, check_config

__all__ = [
    "Config",
    "ConfigError",
    "Foreign",
    "Mismatch",
    "Origin",
    "Problem",
    "Section",
    "Sections",
    "build",
    "check_arguments",
    "check_config",
    "check_description",
    "check_value",
    "checked",
    "dotted",
    "find_class",
    "load",
    "merge",
    "override",
    "read_yaml",
    "ready_configs",
    "write_yaml",
]
