"""Charts as HTML and SVG, in the colours of the page they stand on, so that they follow its light or dark scheme."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

from widefield.streaming.budget import format_bytes

COLOURS = 8
"""Colours that a page has, `--c0` to `--c7`."""
_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 428, 10, 210
_ROUNDING = 1e-9
_FEW = 40
"""Points up to which each is marked, and tells its numbers under the mouse."""


@dataclass(frozen=True)
class Line:
    """A line of points (x, y), and a band from `low` to `high` around it if they are given. NaN leaves a gap.

    Raises:
        ValueError: Numbers of points differ.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

    def __post_init__(self) -> None:
        counts = {len(one) for one in (self.x, self.y, self.low, self.high) if one is not None}
        if len(counts) > 1 or (self.low is None) != (self.high is None):
            raise ValueError(f"{self.name}: x, y, low and high have {sorted(counts)} points; give as many of each")


def binned(name: str, x: Sequence[float], y: Sequence[float], count: int = 60) -> Line:
    """Return a line of at most `count` means of neighbouring points, with a band from their least to their greatest."""
    parts = np.array_split(np.array([x, y], np.float64), min(count, len(x)), axis=1)
    if len(parts) == len(x):
        return Line(name, list(x), list(y))
    middle, means = ([float(part[k].mean()) for part in parts] for k in (0, 1))
    return Line(name, middle, means, [float(p[1].min()) for p in parts], [float(p[1].max()) for p in parts])


class _Scale:
    """Positions in the picture of numbers between the ends of `values`, and the round numbers among them.

    An axis of numbers from 0 to 1, as shares and most scores are, does not reach beyond them.
    """

    def __init__(self, values: np.ndarray, first: float, last: float, whole: bool = False) -> None:
        known = values[np.isfinite(values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        if not whole and high - low <= 1e-6 * abs(high):  # else the ticks would tell rounding errors
            low, high = low - 0.1 * (abs(low) or 1), high + 0.1 * (abs(high) or 1)
        # steps of which 1 is a multiple
        self.ticks = np.asarray(MaxNLocator(5, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high), float)
        if whole:
            self.ticks = self.ticks[(self.ticks >= low) & (self.ticks <= high)]
        else:
            if known.size and known.min() >= 0 and known.max() <= 1:
                self.ticks = self.ticks[(self.ticks >= -_ROUNDING) & (self.ticks <= 1 + _ROUNDING)]
            low, high = float(self.ticks[0]), float(self.ticks[-1])
        if low == high:  # one epoch alone is in the middle
            low, high = low - 0.5, high + 0.5
        self._low, self._size = low, high - low
        self._first, self._last = first, last

    def __call__(self, value: float) -> float:
        return round(self._first + (value - self._low) / self._size * (self._last - self._first), 1)


def curves(lines: Sequence[Line], x_label: str = "epoch") -> str:
    """Return a chart of lines over one axis, with their names above; a band that goes beyond all lines is cut off."""
    x = _Scale(np.concatenate([np.asarray(line.x, float) for line in lines]), _LEFT + 6, _RIGHT - 6, whole=True)
    y = _Scale(np.concatenate([np.asarray(line.y, float) for line in lines]), _BOTTOM, _TOP)
    parts = []
    for k, line in enumerate(lines):
        colour = f"var(--c{k % COLOURS})"
        if line.low is not None and line.high is not None:
            ends = [end for end in zip(line.x, line.low, line.high) if all(map(math.isfinite, end))]
            outline = [(at, high) for at, _, high in ends] + [(at, low) for at, low, _ in reversed(ends)]
            points = " ".join(f"{x(at)},{min(max(y(value), _TOP), _BOTTOM)}" for at, value in outline)
            parts.append(f'<polygon points="{points}" fill="{colour}" opacity=".2"/>')
        known = [(at, value) for at, value in zip(line.x, line.y, strict=True) if math.isfinite(value)]
        path, before = [], False
        for at, value in zip(line.x, line.y, strict=True):
            if math.isfinite(value):
                path.append(f"{'L' if before else 'M'}{x(at)} {y(value)}")
            before = math.isfinite(value)
        parts.append(f'<path d="{" ".join(path)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(known) <= _FEW:
            parts += [
                _dot(x(at), y(value), f"{line.name}, {x_label} {at:g}: {value:.4g}", colour) for at, value in known
            ]
    return _legend([line.name for line in lines]) + _axes(x, y, parts, x_label, ", ".join(line.name for line in lines))


def scatter(
    x_values: Sequence[float], y_values: Sequence[float], names: Sequence[str], x_label: str, y_label: str
) -> str:
    """Return a chart of points, each with a name under the mouse, and the diagonal where both numbers are the same."""
    both = np.array([*x_values, *y_values], float)
    x, y = _Scale(both, _LEFT, _RIGHT), _Scale(both, _BOTTOM, _TOP)
    low, high = float(x.ticks[0]), float(x.ticks[-1])
    parts = [f'<path d="M{x(low)} {y(low)}L{x(high)} {y(high)}" class="grid" stroke-dasharray="4 4"/>']
    for across, up, name in zip(x_values, y_values, names, strict=True):
        if math.isfinite(across) and math.isfinite(up):
            parts.append(_dot(x(across), y(up), f"{name}: {x_label} {across:.4g}, {y_label} {up:.4g}", "var(--c0)", 4))
    return _axes(x, y, parts, x_label, f"{y_label} over {x_label}", y_label)


def _dot(x: float, y: float, text: str, colour: str, radius: float = 2.5) -> str:
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"><title>{html.escape(text)}</title></circle>'


def _axes(x: _Scale, y: _Scale, parts: Sequence[str], x_label: str, title: str, y_label: str = "") -> str:
    marks = [f'<path d="M{_LEFT} {y(tick)}H{_RIGHT}" class="grid"/>' for tick in y.ticks]
    marks += [f'<text x="{_LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:.4g}</text>' for tick in y.ticks]
    marks += [f'<text x="{x(tick)}" y="{_BOTTOM + 17}" text-anchor="middle">{tick:.4g}</text>' for tick in x.ticks]
    middle = (_LEFT + _RIGHT) / 2
    marks.append(f'<text x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{html.escape(x_label)}</text>')
    if y_label:
        at = (_TOP + _BOTTOM) / 2
        turned = f'transform="rotate(-90 12 {at})" text-anchor="middle"'
        marks.append(f'<text x="12" y="{at}" {turned}>{html.escape(y_label)}</text>')
    name = html.escape(title, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">{"".join((*marks, *parts))}</svg>'


def _legend(names: Sequence[str]) -> str:
    keys = (
        f'<span class="key" style="--c:var(--c{k % COLOURS})">{html.escape(name)}</span>'
        for k, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def memory_bars(kinds: Mapping[str, int], others: Mapping[str, int | None], budget: int | None) -> str:
    """Return bars of bytes: one for each kind of a plan that is not zero, their sum, and `others`, beside a line for the budget.

    Args:
        kinds: Bytes by kind, as `Plan.predicted_bytes` has them.
        others: More bars by name, None leaves one out.
        budget: Where the line is; None draws none.
    """
    shown = {kind: size for kind, size in kinds.items() if size}
    more = {name: size for name, size in others.items() if size is not None}
    total = sum(shown.values())
    top = max(total, budget or 0, *more.values(), 1) * 1.02
    rows = [(kind, size, [(k, size)]) for k, (kind, size) in enumerate(shown.items())]
    rows.append(("all of the plan", total, list(enumerate(shown.values()))))
    rows += [(name, size, [(COLOURS, size)]) for name, size in more.items()]
    line = "" if budget is None else f'<i style="left:{budget / top:.2%}"></i>'
    drawn = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{line}"
        + "".join(f'<b style="width:{part / top:.2%};--c:var(--c{k})"></b>' for k, part in parts)
        + f"</dd><dd>{format_bytes(size)}</dd>"
        for name, size, parts in rows
    )
    return f'<dl class="bars">{drawn}</dl>'


def confusion(matrix: np.ndarray, names: Sequence[str]) -> str:
    """Return a table of counts (C, C), true classes as rows, each cell coloured by its share of the true class."""
    totals = np.maximum(matrix.sum(1, keepdims=True), 1)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    rows = []
    for k, (name, counts, shares) in enumerate(zip(names, matrix, matrix / totals, strict=True)):
        cells = "".join(
            f'<td class="{"right" if k == j else "wrong"}{" strong" if share > 0.6 else ""}" style="--share:{share:.1%}" '
            f'title="{share:.1%} of {html.escape(name, quote=True)}">{count}</td>'
            for j, (count, share) in enumerate(zip(counts, shares, strict=True))
        )
        rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return (
        f'<div class="scroll"><table class="confusion"><thead><tr><th>true \\ predicted</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
