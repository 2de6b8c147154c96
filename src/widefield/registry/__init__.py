"""Components by name. `MODELS` is the registry of backbones, necks, heads, losses, target generators and models.

Imports nothing heavy; a component is imported when it is asked for. An installed package brings components of its own by entry
points of the group `widefield.components`: a name, and `package.module:Class`.
"""

from functools import partial

from widefield.registry.arguments import REQUIRED, Argument, Arguments, arguments_of, wrong_names
from widefield.registry.imports import absolute_place, import_module_or_file, import_object, near_names, suggestion
from widefield.registry.index import Entry, registered_in, transforms
from widefield.registry.outline import OutlineError, outline
from widefield.registry.registry import (
    ComponentOf,
    DuplicateNameError,
    Range,
    Registry,
    UnknownNameError,
    split_description,
)

MODELS = Registry(
    "component",
    partial(registered_in, "MODELS", "components", "modules"),
    group="widefield.components",
    sequence="torch.nn:Sequential",
)

DATASETS = Registry("dataset", partial(registered_in, "DATASETS", "data"), group="widefield.datasets")
"""Data sets, and data modules over them."""

METRICS = Registry("metric", partial(registered_in, "METRICS", "components/metrics"), group="widefield.metrics")
"""Metrics of predictions, see `widefield.components.metrics`."""

TRANSFORMS = Registry("transform", transforms, group="widefield.transforms")
"""Changes of an image between a data set and the model."""

__all__ = [
    "DATASETS",
    "METRICS",
    "MODELS",
    "REQUIRED",
    "TRANSFORMS",
    "Argument",
    "Arguments",
    "ComponentOf",
    "DuplicateNameError",
    "Entry",
    "OutlineError",
    "Range",
    "Registry",
    "UnknownNameError",
    "absolute_place",
    "arguments_of",
    "import_module_or_file",
    "import_object",
    "near_names",
    "outline",
    "registered_in",
    "split_description",
    "suggestion",
    "wrong_names",
]
