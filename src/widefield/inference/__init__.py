"""Models by name, and what they predict of images: classes, features, similar images; how good they are.

Names load their part on first use (PEP 562): listing the names of models needs no torch.
"""

from widefield import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
