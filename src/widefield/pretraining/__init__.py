"""Self-supervised pretraining: a model, images without labels, a method.

    import widefield

    widefield.train(out="out/my_experiment", data="my_images", model="torchvision/resnet18")

Names load their part on first use (PEP 562).
"""

import importlib
from typing import Any

_HOME = {
    "EmbeddingModel": "embedding",
    "METHODS": "methods",
    "Method": "methods.base",
    "ModelWrapper": "wrapper",
    "Run": "methods.base",
    "embed": "embed_images",
    "export": "exporting",
    "pretrain": "training",
    "train": "training",
    "wrap": "wrapping",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
