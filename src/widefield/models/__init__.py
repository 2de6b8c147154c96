"""Whole models, by name and ready to train."""

from widefield.models.classifier import Classifier, StreamingTimm, read_checkpoint
from widefield.models.convnext import StreamingConvNeXt
from widefield.models.networks import RESNETS, make_model
from widefield.models.patch_encoder import PatchEncoder
from widefield.models.resnet import StreamingResNet
from widefield.models.tasks import TaskParts, parts_of
from widefield.models.weights import load_state, load_weights

__all__ = [
    "RESNETS",
    "Classifier",
    "PatchEncoder",
    "StreamingConvNeXt",
    "StreamingResNet",
    "StreamingTimm",
    "TaskParts",
    "load_state",
    "load_weights",
    "make_model",
    "parts_of",
    "read_checkpoint",
]
