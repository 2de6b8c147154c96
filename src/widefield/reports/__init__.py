"""Heatmaps and reports."""

from widefield.reports.figures import learning_rates, save_confusion_matrix, save_points, save_schedule, tsne
from widefield.reports.grad_cam import NoMapError, cells_of, class_activation, grad_cam
from widefield.reports.heatmap import Heatmap
from widefield.reports.memory import PeakMemory, plain_step_bytes
from widefield.reports.overlay import ScaleBar, save_overlay, save_picture, scale_bar
from widefield.reports.page import Page
from widefield.reports.progress import ProgressLine

__all__ = [
    "Heatmap",
    "NoMapError",
    "Page",
    "PeakMemory",
    "ProgressLine",
    "ScaleBar",
    "cells_of",
    "class_activation",
    "grad_cam",
    "learning_rates",
    "plain_step_bytes",
    "save_confusion_matrix",
    "save_overlay",
    "save_picture",
    "save_points",
    "save_schedule",
    "scale_bar",
    "tsne",
]
