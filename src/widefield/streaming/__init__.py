"""The engine: any image size, exactly, in the memory you have. Imports torch, and of Widefield the root of its errors alone."""

from widefield.streaming.calibration import calibrate_batch_norm
from widefield.streaming.errors import UnsupportedOpError, VerificationError
from widefield.streaming.local import Local, LocalError
from widefield.streaming.module import StreamingCNN, stream
from widefield.streaming.plan import Plan
from widefield.streaming.pointwise_functions import register_op
from widefield.streaming.receptive_field import Cells
from widefield.streaming.split import split
from widefield.streaming.tiles import LazyImage

__all__ = [
    "Cells",
    "LazyImage",
    "Local",
    "LocalError",
    "Plan",
    "StreamingCNN",
    "UnsupportedOpError",
    "VerificationError",
    "calibrate_batch_norm",
    "register_op",
    "split",
    "stream",
]
