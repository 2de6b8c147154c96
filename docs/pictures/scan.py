"""Draw docs/pictures/scan.svg: which rows of each map a step computes, and which are carried to it.

uv run python -m docs.pictures.scan
"""

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
    "new": "computed in this step",
    "carried": "carried from the step before",
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


def svg() -> str:
    """The picture as text."""
    names = ["image", *LAYERS]
    panel = len(names) * (WIDTH + GAP) + GAP
    rectangles, words = [], []
    for k, step in enumerate(states()):
        words.append((k * panel + panel / 2, 18, f"step {k + 1}", "bold"))
        for m, rows in enumerate(step):
            x, cell = k * panel + GAP + m * (WIDTH + GAP), HEIGHT * CELL / len(rows)
            words.append((x + WIDTH / 2, 36, names[m].strip(), "normal"))
            rectangles += [(x, TOP + r * cell, WIDTH, cell, COLOURS[kind]) for r, kind in enumerate(rows)]
    y = TOP + HEIGHT * CELL + 16
    for k, (kind, meaning) in enumerate(MEANING.items()):
        rectangles.append((GAP + k * 220, y, 14, 14, COLOURS[kind]))
        words.append((GAP + k * 220 + 20, y + 12, meaning, "start"))
    lines = [
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" stroke="#8a929c" stroke-width="0.6"/>'
        for x, y, w, h, fill in rectangles
    ]
    for x, y, text, style in words:
        anchor, weight = ("start", "normal") if style == "start" else ("middle", style)
        lines.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}">{text}</text>')
    width, height = STEPS * panel, TOP + HEIGHT * CELL + 44
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *lines, "</svg>\n"])


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(svg())
