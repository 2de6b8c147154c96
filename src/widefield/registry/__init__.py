"""Components by name. `MODELS` is the registry of all of them: backbones, necks, heads, losses, target generators, models.

Imports nothing heavy; a component is imported when it is asked for. An installed package brings components of its own by entry
points of the group `widefield.components`: a name, and `package.module:Class`.
"""

from widefield.registry.arguments import REQUIRED, Argument, Arguments, arguments_of
from widefield.registry.description import ComponentOf, split_description
from widefield.registry.imports import absolute_place, import_module_or_file, import_object
from widefield.registry.index import COMPONENTS
from widefield.registry.near import near_names, suggestion
from widefield.registry.ranges import Range
from widefield.registry.registry import DuplicateNameError, Entry, Registry, UnknownNameError

MODELS = Registry("component", COMPONENTS, group="widefield.components", sequence="torch.nn:Sequential")

__all__ = [
    "COMPONENTS",
    "MODELS",
    "REQUIRED",
    "Argument",
    "Arguments",
    "ComponentOf",
    "DuplicateNameError",
    "Entry",
    "Range",
    "Registry",
    "UnknownNameError",
    "absolute_place",
    "arguments_of",
    "import_module_or_file",
    "import_object",
    "near_names",
    "split_description",
    "suggestion",
]
