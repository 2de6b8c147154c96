"""Thresholds of scores."""

from collections.abc import Sequence

Thresholds = float | None | Sequence[float | None]


def as_thresholds(thrs: Thresholds) -> tuple[float | None, ...]:
    """One threshold or several, as a tuple; None is no threshold."""
    return (thrs,) if thrs is None or isinstance(thrs, (int, float)) else tuple(thrs)


def threshold_suffixes(thrs: Sequence[float | None]) -> list[str]:
    """What the names of values end in: nothing for a single threshold, else such as `_thr-0.50` and `_no-thr`."""
    if len(thrs) == 1:
        return [""]
    return ["_no-thr" if thr is None else f"_thr-{thr:.2f}" for thr in thrs]
