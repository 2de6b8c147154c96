"""Components that configurations put together: backbones, necks, heads, losses.

Names load their part on first use (PEP 562). To add one, write its file in the folder of its kind, under the decorator
`@MODELS.register_module()`.
"""

import importlib
from typing import Any

from widefield.registry import MODELS

_HOME = {
    "BaseBackbone": "backbones.base_backbone",
    "BaseModel": "models.base_model",
    "BaseSelfSupervisor": "models.base_model",
    "Component": "component",
    "DataSample": "data_sample",
    "StreamableBackbone": "backbones.base_backbone",
    "build_activation_layer": "component",
    "build_conv_layer": "component",
    "build_norm_layer": "component",
    "mmpretrain_names": "key_maps",
    "weight_reduce_loss": "losses.reduction",
    "weighted_loss": "losses.reduction",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in MODELS.index:
        module, _, attribute = MODELS.index[name].target.partition(":")
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__dir__())}")


def __dir__() -> list[str]:
    return sorted([*_HOME, *MODELS.index])
