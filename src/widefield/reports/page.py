"""A report: one HTML file with its tables, charts and pictures inside, for screens of any width, light or dark."""

import base64
import html
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from widefield.writing import replacing

_LARGE = 2**18
"""Bytes of a PNG beyond which it becomes a JPEG: a page has to go by mail."""
_STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


class Page:
    """Headings, paragraphs, tables, charts and pictures, in the order they are added. It asks no network for anything."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def code(self, text: str) -> None:
        """Text in a fixed-width font, line by line."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def numbers(self, numbers: Iterable[tuple[str, object]]) -> None:
        """Names with a number each, in large type; floats are shown with three significant digits."""
        cells = (
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(_cell(value, 3))}</dd></div>" for name, value in numbers
        )
        self._parts.append(f'<dl class="numbers">{"".join(cells)}</dl>')

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table; floats are shown with four significant digits."""
        lines = [list(row) for row in rows]
        head = "".join(
            f"<th{_class(line[k] for line in lines)}>{html.escape(name)}</th>" for k, name in enumerate(columns)
        )
        body = "".join(
            "<tr>" + "".join(f"<td{_class([cell])}>{html.escape(_cell(cell, 4))}</td>" for cell in line) + "</tr>"
            for line in lines
        )
        self._parts.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    @contextmanager
    def folded(self, summary: str) -> Iterator[None]:
        """Show on request only what is added in this context."""
        self._parts.append(f"<details><summary>{html.escape(summary)}</summary>")
        yield
        self._parts.append("</details>")

    def chart(self, markup: str, caption: str = "", wide: bool = False) -> None:
        """A chart of `widefield.reports.charts`, taken as it is; see `picture` for the rest."""
        start = '<figure class="wide">' if wide else "<figure>"
        text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
        self._parts.append(f"{start}{markup}{text}</figure>")

    def picture(self, png: bytes, caption: str, wide: bool = False) -> None:
        """A PNG picture, put into the page itself, a large one as JPEG; a `wide` one fills the page, others stand side by side."""
        kind, content = ("png", png) if len(png) <= _LARGE else ("jpeg", _as_jpeg(png))
        data = base64.b64encode(content).decode("ascii")
        self.chart(f'<img alt="{html.escape(caption)}" src="data:image/{kind};base64,{data}">', caption, wide)

    def write(self, path: str | Path) -> None:
        """Write the page as one HTML file that needs no other; whole or not at all."""
        title = html.escape(self._title)
        text = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>\n{_STYLE}</style></head>\n<body>\n" + "\n".join(self._parts) + "\n</body></html>\n"
        )
        with replacing(Path(path)) as partial:
            partial.write_text(text, encoding="utf-8")


def _as_jpeg(png: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _class(values: Iterable[object]) -> str:
    """Return the class of a cell over, or with, such values: numbers stand on the right."""
    return ' class="number"' if any(isinstance(value, (int, float)) for value in values) else ""


def _cell(value: object, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
