"""The code that asks PyTorch for something during a capture: the model's, or that of the tracing."""

import functools
import types
from pathlib import Path

import torch

TORCH, OURS = str(Path(torch.__file__).parent), str(Path(__file__).parent)
# Files that only pass a call on: it is asked by whoever calls them.
_BETWEEN = frozenset(
    f"{TORCH}/{name}"
    for name in (
        *("overrides.py", "_tensor.py", "functional.py", "autograd/__init__.py", "autograd/graph.py", "_VF.py"),
        *("autograd/function.py", "autograd/grad_mode.py", "utils/_contextlib.py"),
    )
)
_DECORATORS = f"{TORCH}/utils/_contextlib.py"


def by_model(frame: types.FrameType | None) -> bool:
    """True if the code that asks is the model's, layers of PyTorch among it, and not the tracing."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _DECORATORS:  # of a function under @torch.no_grad(), that function asks
            code = getattr(frame.f_locals.get("func"), "__code__", code)
        if frame.f_code.co_name != "__torch_function__" and (asked := asks(code.co_filename)) is not None:
            return asked
        frame = frame.f_back
    return False


@functools.cache
def asks(file: str) -> bool | None:
    """True for the files of models, False for those of the tracing, None for those that only pass a call on."""
    if file in _BETWEEN:
        return None
    if file.startswith(TORCH):
        return file.startswith(f"{TORCH}/nn/") and not file.endswith("modules/module.py")
    return not file.startswith((OURS, "<frozen"))
