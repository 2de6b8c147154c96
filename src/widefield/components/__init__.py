"""Components that configurations put together: backbones, necks, heads, losses.

Names load their part on first use (PEP 562). To add one, write its file in the folder of its kind, under the decorator
`@MODELS.register_module()`; `__init__.pyi`, which editors and mypy read, has the files.
"""

from typing import Any

from widefield import lazy_names
from widefield.registry import MODELS, import_object

_find, __dir__, _ = lazy_names(__name__, __file__, lambda: MODELS.index)


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return __dir__()
    if name in MODELS.index:
        return import_object(MODELS.index[name].target)
    return _find(name)
