"""How good predictions are. `METRICS` is the registry of metrics; each computes a dictionary of named values.

Metrics are those of torchmetrics: `update(preds, target)`, `compute()`, `reset()`, and sums over all processes. Nothing heavy is
imported before a metric is asked for.
"""

from widefield.registry import Registry
from widefield.registry.index import METRIC_ENTRIES

METRICS = Registry("metric", METRIC_ENTRIES, group="widefield.metrics")

__all__ = ["METRICS"]
