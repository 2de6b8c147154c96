"""Heatmaps and reports."""

from widefield.reports.figures import (
    ScaleBar,
    learning_rates,
    save_confusion_matrix,
    save_overlay,
    save_points,
    save_schedule,
    scale_bar,
    tsne,
)
from widefield.reports.grad_cam import NoMapError, class_activation, grad_cam, peak
from widefield.reports.memory import PeakMemory, plain_step_bytes
from widefield.reports.page import Page

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
