"""Whole models, by name and ready to train."""

from widefield.models.classifier import Classifier, read_checkpoint
from widefield.models.names import RESNETS
from widefield.models.plain import make_model
from widefield.models.weights import load_weights

__all__ = ["RESNETS", "Classifier", "load_weights", "make_model", "read_checkpoint"]
