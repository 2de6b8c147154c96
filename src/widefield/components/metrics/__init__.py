"""Metrics of predictions. `METRICS` is the registry of metrics; each computes a dictionary of named values.

Metrics are those of torchmetrics: `update(preds, target)`, `compute()`, `reset()`, and sums over all processes. Nothing heavy is
imported before a metric is asked for.
"""

from functools import partial

from widefield.registry import Registry, registered_in

METRICS = Registry("metric", partial(registered_in, "METRICS", "components/metrics"), group="widefield.metrics")

__all__ = ["METRICS"]
