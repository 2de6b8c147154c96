"""Whole models, by name and ready to train."""

from widefield.models.checkpointed import FromCheckpoint, pixels_in, read_checkpoint
from widefield.models.classifier import Classifier, StreamingTimm
from widefield.models.convnext import StreamingConvNeXt
from widefield.models.graphs import GRAPHS, DifferentGraphError, write_graph
from widefield.models.networks import RESNETS, make_model
from widefield.models.patch_encoder import PatchEncoder
from widefield.models.resnet import StreamingResNet
from widefield.models.segmenter import SEGMENTATION_NETWORKS, MapRegressor, Segmenter, class_of
from widefield.models.tasks import TaskParts, parts_of
from widefield.models.weights import load_state, load_weights

__all__ = [
    "GRAPHS",
    "RESNETS",
    "SEGMENTATION_NETWORKS",
    "Classifier",
    "DifferentGraphError",
    "FromCheckpoint",
    "MapRegressor",
    "PatchEncoder",
    "Segmenter",
    "StreamingConvNeXt",
    "StreamingResNet",
    "StreamingTimm",
    "TaskParts",
    "class_of",
    "load_state",
    "load_weights",
    "make_model",
    "parts_of",
    "pixels_in",
    "read_checkpoint",
    "write_graph",
]
