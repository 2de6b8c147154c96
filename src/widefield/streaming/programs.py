"""The programs of one module, kept: traced where it must be, derived for another image size where that is proven right."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from widefield.streaming.build import build
from widefield.streaming.capture import capture
from widefield.streaming.graph import Program
from widefield.streaming.trace import Trace

_KEPT_SIZES = 16  # image sizes whose program is kept
_KEPT_TRACES = 8  # traces that are kept of all that were needed


class Programs:
    """See the module's page. `get` notices when the module has changed in a way that matters."""

    def __init__(self) -> None:
        self._traces: dict[Any, list[Trace]] = {}
        self._programs: dict[Any, Program] = {}

    def get(
        self,
        module: nn.Module,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        autocast: bool,
        batch_statistics: bool,
        allow_whole: bool,
    ) -> Program:
        """The program of `module` for images of `shape` (N, C, H, W) and `dtype`; arguments as for `capture` and `build`."""
        norms = (part.training for part in module.modules() if isinstance(part, _NormBase))
        modes = tuple(norms) if batch_statistics else ()
        kind = (shape[:2], dtype, autocast, modes, allow_whole, _fingerprint(module))
        key = (shape, kind)
        if key not in self._programs:
            traces = self._traces.setdefault(kind, [])
            captured = next((found for trace in traces if (found := trace.at(*shape[2:])) is not None), None)
            if captured is None:
                fixed = any(trace.fixed for trace in traces)  # it could not be traced with symbols: not again
                trace = capture(module, shape, dtype, autocast, batch_statistics, symbolic=not fixed)  # type: ignore[arg-type]
                captured = trace.at(*shape[2:])
                assert captured is not None
                traces.append(trace)
                _forget(traces, _KEPT_TRACES)
            program = build(captured, allow_whole=allow_whole)
            self._programs[key] = program
            _forget(self._programs, _KEPT_SIZES)
            _forget(self._traces, _KEPT_TRACES)
        return self._programs[key]


def _forget(kept: dict[Any, Any] | list[Any], count: int) -> None:
    """Drop the oldest entries."""
    while len(kept) > count:
        kept.pop(next(iter(kept)) if isinstance(kept, dict) else 0)


def _fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Changes when the module would be captured differently: other layers, settings, modes, or shapes of parameters."""
    parts: list[Any] = []
    for name, part in module.named_modules(remove_duplicate=False):
        settings = tuple(
            (key, _frozen(value))
            for key, value in part.__dict__.items()
            if key not in _MODULE_STATE and not (key == "training" and isinstance(part, _NormBase))
        )
        tensors = tuple(
            (key, None if t is None else (tuple(t.shape), t.dtype))
            for key, t in (*part._parameters.items(), *part._buffers.items())
        )
        parts.append((name, type(part), settings, tensors, len(part._forward_hooks), len(part._forward_pre_hooks)))
    return tuple(parts)


# What nn.Module keeps for itself: the parts of it that matter are looked at one by one.
_MODULE_STATE = frozenset(nn.Module().__dict__) - {"training"}


def _frozen(value: Any) -> Any:
    """An attribute as something hashable that changes when it does; objects that can't be looked into count by identity."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in value.items())
    return (id(value), value._version) if isinstance(value, Tensor) and not value.is_inference() else id(value)
