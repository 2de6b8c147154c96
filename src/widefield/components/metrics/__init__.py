"""Metrics of predictions. `METRICS` is the registry of metrics; each computes a dictionary of named values.

Metrics are those of torchmetrics: `update(preds, target)`, `compute()`, `reset()`, and sums over all processes. Nothing heavy is
imported before a metric is asked for.
"""

from widefield.registry import METRICS

__all__ = ["METRICS"]
