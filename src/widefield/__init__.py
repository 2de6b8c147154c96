"""Widefield: train and run vision models on images of any size, exactly, in the memory you have.

Names load their part of the library on first use (PEP 562), so ``import widefield`` is instant and imports no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "StreamingCNN": "streaming",
    "UnsupportedOpError": "streaming",
    "Plan": "streaming",
    "stream": "streaming",
    "split": "streaming",
    "calibrate_batch_norm": "streaming",
    "open_image": "images",
    "BaseModule": "modules",
    "StreamingModule": "modules",
    "ImageNetClassifier": "modules",
    "StreamingConstructor": "modules",
    "AtomicCheckpointIO": "modules",
    "RandomState": "modules",
    "StreamingResNet": "models.resnet",
    "split_resnet": "models.resnet",
    "StreamingConvNeXt": "models.convnext",
    "StreamingConvnext": "models.convnext",
    "StreamingTimm": "models.streaming_timm",
    "MODELS": "registry",
    "FeatureExtractor": "inference",
    "ImageClassificationInferencer": "inference",
    "ImageRetrievalInferencer": "inference",
    "get_model": "inference",
    "inference_model": "inference",
    "list_models": "inference",
    "METHODS": "pretraining",
    "embed": "pretraining",
    "export": "pretraining",
    "pretrain": "pretraining",
    "train": "pretraining",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'widefield' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"widefield.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
