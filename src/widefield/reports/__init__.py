"""Heatmaps and reports. Names load their part on first use (PEP 562)."""

from widefield import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
