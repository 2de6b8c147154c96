"""Lightning modules around a streamed trunk, and what keeps their runs."""

from widefield.modules.base import BaseModule
from widefield.modules.checkpoint_io import AtomicCheckpointIO
from widefield.modules.constructor import StreamingConstructor
from widefield.modules.finite import FiniteTraining, NotFiniteError
from widefield.modules.imagenet_classifier import ImageNetClassifier
from widefield.modules.plain_model import PlainModel
from widefield.modules.random_state import RandomState
from widefield.modules.streaming_module import StreamingModule

__all__ = [
    "AtomicCheckpointIO",
    "BaseModule",
    "FiniteTraining",
    "ImageNetClassifier",
    "NotFiniteError",
    "PlainModel",
    "RandomState",
    "StreamingConstructor",
    "StreamingModule",
]
