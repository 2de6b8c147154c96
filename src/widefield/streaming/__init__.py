"""The engine: any image size, exactly, in the memory you have. Imports torch and nothing else of Widefield."""

from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.image import LazyImage
from widefield.streaming.module import StreamingCNN, stream
from widefield.streaming.plan import Plan

__all__ = ["LazyImage", "Plan", "StreamingCNN", "UnsupportedOpError", "stream"]
