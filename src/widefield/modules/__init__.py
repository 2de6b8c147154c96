"""Lightning modules around a streamed trunk, and what keeps their runs."""

from widefield.modules.constructor import StreamingConstructor
from widefield.modules.dense_module import DenseModule
from widefield.modules.lightstream_modules import ImageNetClassifier, LightningStreamingModule, StreamingModule
from widefield.modules.runs import AtomicCheckpointIO, FiniteTraining, NotFiniteError, RandomState
from widefield.modules.split_images import SplitImages
from widefield.modules.streaming_module import BaseModule, PlainModel

__all__ = [
    "AtomicCheckpointIO",
    "BaseModule",
    "DenseModule",
    "FiniteTraining",
    "ImageNetClassifier",
    "LightningStreamingModule",
    "NotFiniteError",
    "PlainModel",
    "RandomState",
    "SplitImages",
    "StreamingConstructor",
    "StreamingModule",
]
