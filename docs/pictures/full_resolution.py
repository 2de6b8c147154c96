"""Draw docs/pictures/full-resolution.jpg from what `widefield demo` leaves: what a network finds, and what a thumbnail keeps of it.

uv run widefield demo && uv run python -m docs.pictures.full_resolution widefield-demo
"""

import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import widefield as wf

SIDE = 160
"""Height and width of the detail, in pixels of the image."""


def draw(demo: Path, name: str = "image-001") -> Figure:
    """The image, and the surroundings of its greatest evidence at full resolution and on the thumbnail of the demo."""
    with (demo / "full-resolution" / "predictions" / "predictions.csv").open(encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if Path(row["image"]).stem == name)
    image = wf.open_image(demo / "data" / "held-out" / "images" / f"{name}.tif")
    small = wf.open_image(demo / "data" / "held-out" / "thumbnails" / f"{name}.png")
    _, height, width = image.shape
    y, x = (int(row[f"peak_{axis}"]) - SIDE // 2 for axis in "yx")
    factor = height // small.shape[1]
    pictures = {
        f"{height} x {width} pixels, one label: {row['predicted']}.\nFramed: where the network found it": (
            image.read(0, 0, height, width)
        ),
        "The frame at full resolution:\ncells with a checkerboard": image.read(y, x, SIDE, SIDE),
        f"The frame on a thumbnail of {small.shape[1]} pixels:\nthe same in both classes": small.read(
            y // factor, x // factor, SIDE // factor, SIDE // factor
        ),
    }
    figure = Figure((13.5, 5), layout="constrained")
    for axes, (title, pixels) in zip(figure.subplots(1, 3), pictures.items(), strict=True):
        axes.imshow(pixels.transpose(1, 2, 0))
        axes.set_title(title, fontsize=12)
        axes.set_axis_off()
    figure.axes[0].add_patch(Rectangle((x, y), SIDE, SIDE, fill=False, edgecolor="white", linewidth=5))
    figure.axes[0].add_patch(Rectangle((x, y), SIDE, SIDE, fill=False, edgecolor="black", linewidth=2.5))
    return figure


if __name__ == "__main__":
    path = Path(__file__).with_name("full-resolution.jpg")
    draw(Path(sys.argv[1])).savefig(path, dpi=100, bbox_inches="tight", pil_kwargs={"quality": 85, "optimize": True})
