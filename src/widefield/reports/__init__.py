"""Heatmaps and reports."""

from widefield.reports.activation import class_activation, peak
from widefield.reports.memory import PeakMemory, plain_step_bytes
from widefield.reports.overlay import save_overlay
from widefield.reports.page import Page
from widefield.reports.scale_bar import ScaleBar, scale_bar

__all__ = [
    "Page",
    "PeakMemory",
    "ScaleBar",
    "class_activation",
    "peak",
    "plain_step_bytes",
    "save_overlay",
    "scale_bar",
]
