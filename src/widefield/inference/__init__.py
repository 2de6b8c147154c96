"""Models by name, and what they say of images: classes, features, similar images; how good they are.

Names load their part on first use (PEP 562): listing the names of models needs no torch.
"""

import importlib
from typing import Any

_HOME = {
    "AveragedViews": "views",
    "Evaluation": "evaluation",
    "FeatureExtractor": "features",
    "ImageClassificationInferencer": "classification",
    "ImageRetrievalInferencer": "retrieval",
    "ModelInfo": "info",
    "get_model": "models",
    "inference_model": "classification",
    "info_of": "info",
    "list_models": "names",
    "predict_samples": "prediction",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
