"""Names of models: what there is, and what was probably meant."""

import difflib
from collections.abc import Iterable

import torchvision.models

from widefield.models.narrow_resnet import NARROW_RESNETS

TORCHVISION_RESNETS = tuple(
    torchvision.models.list_models(torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])
)
RESNETS = (*TORCHVISION_RESNETS, *NARROW_RESNETS)
TIMM_PREFIX = "timm/"


def unknown_model(name: str, choices: Iterable[str]) -> ValueError:
    """The error for a model name that is not among `choices`; it names the nearest ones."""
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=5, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(choices[:12])}, ..."
    return ValueError(f"there is no model {name!r}; {hint}")
