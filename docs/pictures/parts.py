"""Draw docs/pictures/parts.svg: the parts of the library, as the contract of its imports in pyproject.toml orders them.

uv run python -m docs.pictures.parts
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOLD = {
    "cli": "the command widefield",
    "inference": "trained models on new images",
    "pretraining": "learning without labels",
    "reports": "heatmaps, pages, figures",
    "models": "whole models by name",
    "modules": "Lightning modules",
    "components": "backbones, necks, heads, losses",
    "data": "label tables, data sets, splits",
    "transforms": "lazy augmentation",
    "config": "YAML and Python files, checked",
    "streaming": "the engine: torch only",
    "images": "one lazily read image",
    "registry": "components by name",
    "writing": "files that are never half-written",
    "errors": "the root of all errors",
}
WIDTH, HEIGHT, GAP = 200, 44, 22


def draw() -> str:
    """The layers from top to bottom, an arrow from each to the next."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    rows = [re.findall(r"\w+", layer) for layer in contracts[0]["layers"]]
    assert sorted(name for row in rows for name in row) == sorted(TOLD)
    full = max(map(len, rows)) * (WIDTH + GAP) + GAP
    shapes, y = [], 4
    for row in rows:
        left = (full - len(row) * (WIDTH + GAP) + GAP) / 2
        for k, name in enumerate(row):
            x = left + k * (WIDTH + GAP)
            colour = "#f2a541" if name == "streaming" else "#3b7dd8"
            shapes.append(
                f'<rect x="{x:g}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="6" fill="#fff" stroke="{colour}" stroke-width="2"/>'
                f'<text x="{x + WIDTH / 2:g}" y="{y + 18}" font-weight="bold">{name}</text>'
                f'<text x="{x + WIDTH / 2:g}" y="{y + 35}" font-size="12">{TOLD[name]}</text>'
            )
        y += HEIGHT + GAP
        if row != rows[-1]:
            shapes.append(
                f'<path d="M{full / 2:g} {y - GAP + 2}v{GAP - 7}m-5-5l5 5 5-5" fill="none" stroke="#888" stroke-width="2"/>'
            )
    style = 'font-family="system-ui, sans-serif" font-size="14" text-anchor="middle" fill="#222"'
    size = f'viewBox="0 0 {full} {y - GAP + 4}" width="{full}" height="{y - GAP + 4}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(shapes) + "\n</svg>\n"


if __name__ == "__main__":
    Path(__file__).with_name("parts.svg").write_text(draw(), encoding="utf-8")
