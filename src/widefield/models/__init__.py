"""Whole models, by name and ready to train."""

from widefield.models.checkpointed import FromCheckpoint, read_checkpoint
from widefield.models.classifier import Classifier, StreamingTimm
from widefield.models.convnext import StreamingConvNeXt
from widefield.models.networks import RESNETS, make_model
from widefield.models.patch_encoder import PatchEncoder
from widefield.models.resnet import StreamingResNet
from widefield.models.segmenter import SEGMENTATION_NETWORKS, Segmenter
from widefield.models.tasks import TaskParts, parts_of
from widefield.models.weights import load_state, load_weights

__all__ = [
    "RESNETS",
    "SEGMENTATION_NETWORKS",
    "Classifier",
    "FromCheckpoint",
    "PatchEncoder",
    "Segmenter",
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
