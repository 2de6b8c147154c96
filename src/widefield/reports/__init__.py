"""Heatmaps and reports."""

from widefield.reports.activation import class_activation, peak
from widefield.reports.confusion import save_confusion_matrix
from widefield.reports.grad_cam import NoMapError, grad_cam
from widefield.reports.memory import PeakMemory, plain_step_bytes
from widefield.reports.overlay import save_overlay
from widefield.reports.page import Page
from widefield.reports.scale_bar import ScaleBar, scale_bar
from widefield.reports.schedule import learning_rates, save_schedule
from widefield.reports.tsne import save_points, tsne

__all__ = [
    "NoMapError",
    "Page",
    "PeakMemory",
    "ScaleBar",
    "class_activation",
    "grad_cam",
    "learning_rates",
    "peak",
    "plain_step_bytes",
    "save_confusion_matrix",
    "save_overlay",
    "save_points",
    "save_schedule",
    "scale_bar",
    "tsne",
]
