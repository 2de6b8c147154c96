"""Names of models: what there is, and what was probably meant."""

from collections.abc import Iterable

import torchvision.models

from widefield.models.narrow_resnet import NARROW_RESNETS
from widefield.registry import suggestion

TORCHVISION_RESNETS = tuple(
    torchvision.models.list_models(torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])
)
RESNETS = (*TORCHVISION_RESNETS, *NARROW_RESNETS)
TIMM_PREFIX = "timm/"


def unknown_model(name: str, choices: Iterable[str]) -> ValueError:
    """Return the error for a model name that is not among `choices`; it names the nearest ones."""
    return ValueError(f"there is no model {name!r}; {suggestion(name, choices)}")
