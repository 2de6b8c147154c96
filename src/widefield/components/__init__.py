"""Components that configurations put together: backbones, necks, heads, losses.

Names load their part on first use (PEP 562). To add one, write its file in the folder of its kind and enter it in
`widefield.registry.index`; users register theirs in files of their own.
"""

import importlib
from typing import Any

from widefield.registry import COMPONENTS

_HOME = {
    "BaseModel": f"{__name__}.models.base_model",
    "BaseModule": f"{__name__}.base_module",
    "BaseSelfSupervisor": f"{__name__}.models.base_self_supervisor",
    "DataSample": f"{__name__}.data_sample",
    "build_conv_layer": f"{__name__}.layers.conv",
    "build_norm_layer": f"{__name__}.layers.norm",
    "weighted_loss": f"{__name__}.losses.reduction",
    **{entry.name: entry.target.partition(":")[0] for entry in COMPONENTS if entry.target.startswith(__name__)},
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
