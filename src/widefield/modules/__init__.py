"""Lightning modules around a streamed trunk, and what keeps their runs. Names load their part on first use (PEP 562)."""

from widefield import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
