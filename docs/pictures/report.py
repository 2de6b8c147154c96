"""Draw docs/pictures/report.jpg: a report of `widefield fit`, as Chromium shows it in light and in dark.

uv run python -m docs.pictures.report runs/first/report.html chromium
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

WIDTH, HEIGHT, SHOWN = 1100, 3020, 430
"""Of the window, and the width of each of the two pictures, in pixels."""


def screenshot(page: Path, chromium: str, scheme: int, folder: Path) -> Image.Image:
    """The page in the scheme 0, dark, or 1, light."""
    file = folder / f"{scheme}.png"
    subprocess.run(
        [
            chromium,
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}"),
            *(f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={WIDTH},{HEIGHT}"),
            *(f"--screenshot={file}", page.absolute().as_uri()),
        ],
        check=True,
        capture_output=True,
    )
    picture = Image.open(file).convert("RGB")
    return picture.resize((SHOWN, HEIGHT * SHOWN // WIDTH), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        pictures = [screenshot(Path(sys.argv[1]), sys.argv[2], scheme, Path(folder)) for scheme in (1, 0)]
    both = Image.new("RGB", (2 * SHOWN, pictures[0].height))
    for k, picture in enumerate(pictures):
        both.paste(picture, (k * SHOWN, 0))
    both.save(Path(__file__).parent / "report.jpg", quality=75)
