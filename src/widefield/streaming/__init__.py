"""The engine: any image size, exactly, in the memory you have. Imports torch and nothing else of Widefield."""

from widefield.streaming.calibration import calibrate_batch_norm
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.image import LazyImage
from widefield.streaming.module import StreamingCNN, stream
from widefield.streaming.plan import Plan
from widefield.streaming.split import split

__all__ = ["LazyImage", "Plan", "StreamingCNN", "UnsupportedOpError", "calibrate_batch_norm", "split", "stream"]
