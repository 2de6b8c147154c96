"""Draw docs/pictures/scan.svg and scan-animated.svg: which rows of each map a step computes, and which are carried to it.

uv run python -m docs.pictures.scan
"""

from collections.abc import Iterator
from pathlib import Path

from tests.streaming.reference import Layer

LAYERS = {
    "conv 3": Layer(lambda x: x, kernel=3, padding=1),
    "pool 2": Layer(lambda x: x, kernel=2, stride=2),
    "conv 3 ": Layer(lambda x: x, kernel=3, padding=1),
}
HEIGHT, STRIP, STEPS = 24, 8, 3
CELL, WIDTH, GAP, TOP = 9, 46, 26, 46
COLOURS = {"dropped": "#d9dde2", "carried": "#f2a541", "new": "#3b7dd8", "later": "#ffffff"}
MEANING = {
    "new": "computed now",
    "carried": "carried to this step",
    "dropped": "no longer there",
    "later": "later",
}


def states() -> list[list[list[str]]]:
    """For every step and map (the image first), what each row is."""
    layers, steps = list(LAYERS.values()), []
    heights, done, first = [HEIGHT], [0] * (len(layers) + 1), [0] * len(layers)
    for layer in layers:
        heights.append(layer.ready(heights[-1], heights[-1]))
    for k in range(STEPS):
        before = list(done)
        done[0] = min((k + 1) * STRIP, HEIGHT)
        for m, layer in enumerate(layers):
            done[m + 1] = layer.ready(done[m], heights[m])
        kept = [*first, before[-1]]
        steps.append(
            [
                [
                    "dropped" if r < kept[m] else "carried" if r < before[m] else "new" if r < done[m] else "later"
                    for r in range(height)
                ]
                for m, height in enumerate(heights)
            ]
        )
        first = [max(done[m + 1] * layer.stride - layer.padding, 0) for m, layer in enumerate(layers)]
    return steps


def still() -> str:
    """The steps side by side."""
    panel = (len(LAYERS) + 1) * (WIDTH + GAP) + GAP
    shapes = []
    for k, step in enumerate(states()):
        shapes.append(_text(k * panel + panel / 2, 18, f"step {k + 1}", "middle", "bold"))
        for x, y, height, kind in _cells(step):
            shapes.append(_cell(k * panel + x, y, height, COLOURS[kind]))
        shapes += _names(k * panel)
    return _svg(STEPS * panel, [*shapes, *_legend()])


def animated() -> str:
    """One step after the other: the forward pass, then the backward pass in reverse."""
    width = (len(LAYERS) + 1) * (WIDTH + GAP) + GAP
    forward = states()
    frames = [*forward, *forward[::-1]]
    captions = [f"forward, step {k + 1}" for k in range(STEPS)]
    captions += [f"backward, step {k + 1}: computed again from what was carried to it" for k in reversed(range(STEPS))]
    shapes = []
    for k, (x, y, height, _) in enumerate(_cells(forward[0])):
        fills = [COLOURS[list(_cells(frame))[k][3]] for frame in frames]
        shapes.append(_cell(x + 150, y, height, fills[0], _animate("fill", fills)))
    for k, caption in enumerate(captions):
        shown = [str(int(k == frame)) for frame in range(len(frames))]
        text = _text(width / 2 + 150, 18, caption, "middle", "bold", _animate("opacity", shown))
        shapes.append(text.replace("<text", f'<text opacity="{shown[0]}"', 1))  # the first frame where nothing moves
    return _svg(width + 300, [*shapes, *_names(150), *_legend()])


def _cells(step: list[list[str]]) -> Iterator[tuple[float, float, float, str]]:
    """Left and top, height and kind of each row of each map."""
    for m, rows in enumerate(step):
        height = HEIGHT * CELL / len(rows)
        for r, kind in enumerate(rows):
            yield GAP + m * (WIDTH + GAP), TOP + r * height, height, kind


def _names(left: float) -> list[str]:
    centres = (left + GAP + m * (WIDTH + GAP) + WIDTH / 2 for m in range(len(LAYERS) + 1))
    return [_text(x, 36, name.strip(), "middle") for x, name in zip(centres, ["image", *LAYERS], strict=True)]


def _legend() -> list[str]:
    y = TOP + HEIGHT * CELL + 16
    shapes = []
    for k, (kind, meaning) in enumerate(MEANING.items()):
        shapes.append(_rectangle(GAP + k * 150, y, 14, 14, COLOURS[kind]))
        shapes.append(_text(GAP + k * 150 + 20, y + 12, meaning, "start"))
    return shapes


def _cell(x: float, y: float, height: float, fill: str, inner: str = "") -> str:
    return _rectangle(x, y, WIDTH, height, fill, inner)


def _rectangle(x: float, y: float, width: float, height: float, fill: str, inner: str = "") -> str:
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} fill="{fill}" stroke="#8a929c" stroke-width="0.6">{inner}</rect>'


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal", inner: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}">{text}{inner}</text>'


def _animate(attribute: str, values: list[str]) -> str:
    timing = f'dur="{1.5 * len(values):g}s" calcMode="discrete" repeatCount="indefinite"'
    return f'<animate attributeName="{attribute}" values="{";".join(values)}" {timing}/>'


def _svg(width: float, shapes: list[str]) -> str:
    height = TOP + HEIGHT * CELL + 44
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, f'<rect width="{width:g}" height="{height}" fill="#ffffff"/>', *shapes, "</svg>\n"])


if __name__ == "__main__":
    here = Path(__file__)
    here.with_suffix(".svg").write_text(still())
    here.with_name("scan-animated.svg").write_text(animated())
