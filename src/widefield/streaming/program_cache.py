"""The programs of one module, kept: traced where it must be, derived for another image size where that is proven right."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from widefield.streaming.autocast import Autocast
from widefield.streaming.build import build
from widefield.streaming.capture import trace_module
from widefield.streaming.captured import CallKind
from widefield.streaming.fingerprint import fingerprint
from widefield.streaming.program import Program
from widefield.streaming.refusals import has_backward_hooks
from widefield.streaming.trace import Trace

_KEPT_SIZES = 16  # image sizes whose program is kept
_KEPT_TRACES = 8  # traces that are kept of all that were needed


class ProgramCache:
    """See the module's docstring. `get` notices when the module has changed in a way that matters."""

    def __init__(self) -> None:
        self._traces: dict[Any, list[tuple[Any, Trace, Autocast | None]]] = {}
        self._programs: dict[Any, Program] = {}

    def get(self, module: nn.Module, call: CallKind, batch_statistics: bool, allow_whole: bool) -> Program:
        """The program of `module` for such a call; `batch_statistics` as for `trace_module`, `allow_whole` as for `build`.

        What `forward` decides by the grad mode is decided by the current one.
        """
        norms = (part.training for part in module.modules() if isinstance(part, _NormBase))
        modes = tuple(norms) if batch_statistics else ()
        others = tuple((x.shape[:-2], x.dtype) for x in call.map_inputs)
        place = call.device.type, call.autocast
        hooked = torch.is_grad_enabled() and has_backward_hooks(module)  # is refused, but without gradients
        kind = (call.shape[:2], others, call.dtype, *place, modes, allow_whole, hooked, fingerprint(module))
        mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), call.requires_grad
        for at in (None, mode):
            if (found := self._programs.get((call.lengths, kind, at))) is not None:
                return found
        traces = self._traces.setdefault(kind, [])
        usable = [(trace, under) for at, trace, under in traces if at in (None, mode)]
        fitting = ((trace, c, under) for trace, under in usable if (c := trace.at(*call.lengths)) is not None)
        trace, captured, under = next(fitting, (None, None, None))
        if trace is None or captured is None:
            fixed = any(trace.fixed for _, trace, _ in traces)  # it could not be traced with symbols: not again
            trace = trace_module(module, call, batch_statistics, symbolic=not fixed)
            captured = trace.at(*call.lengths)
            assert captured is not None
            under = None if call.autocast is None else Autocast(call.device.type, call.autocast)
            traces.append((mode if trace.mode_dependent else None, trace, under))
            forget(traces, _KEPT_TRACES)
        program = replace(build(captured, allow_whole=allow_whole, autocast=under), kind=kind)
        self._programs[call.lengths, kind, mode if trace.mode_dependent else None] = program
        forget(self._programs, _KEPT_SIZES)
        forget(self._traces, _KEPT_TRACES)
        return program

    def holds(self, program: Program, call: CallKind) -> bool:
        """True if a program for such a call follows from what is traced already, as `program` did."""
        return any(trace.at(*call.lengths) is not None for _, trace, _ in self._traces.get(program.kind, ()))


def forget(kept: dict[Any, Any] | list[Any], count: int) -> None:
    """Drop the oldest entries."""
    while len(kept) > count:
        if isinstance(kept, dict):
            kept.pop(next(iter(kept)), None)  # another thread may have done so
        else:
            kept.pop(0)
