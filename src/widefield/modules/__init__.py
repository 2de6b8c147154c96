"""Lightning modules around a streamed trunk."""

from widefield.modules.base import BaseModule
from widefield.modules.checkpoint_io import AtomicCheckpointIO
from widefield.modules.constructor import StreamingConstructor
from widefield.modules.imagenet_classifier import ImageNetClassifier
from widefield.modules.streaming_module import StreamingModule

__all__ = ["AtomicCheckpointIO", "BaseModule", "ImageNetClassifier", "StreamingConstructor", "StreamingModule"]
