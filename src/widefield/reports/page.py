"""A report: one HTML file with its tables and pictures inside."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from widefield.writing import replacing

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
figure { display: inline-block; margin: .5rem; max-width: 28rem; vertical-align: top; } img { max-width: 100%; }
figure.wide { display: block; max-width: none; margin: 1.5rem 0; }
figcaption { font-size: .85rem; color: #555; } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; }
"""


class Page:
    """Headings, paragraphs, tables and pictures, in the order they are added."""

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

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table; floats are shown with four significant digits."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row) + "</tr>" for row in rows
        )
        self._parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def picture(self, png: bytes, caption: str, wide: bool = False) -> None:
        """A PNG picture, put into the page itself; a `wide` one fills the page, others stand side by side."""
        data = base64.b64encode(png).decode("ascii")
        text = html.escape(caption)
        image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
        start = '<figure class="wide">' if wide else "<figure>"
        self._parts.append(f"{start}{image}<figcaption>{text}</figcaption></figure>")

    def write(self, path: str | Path) -> None:
        """Write the page as one HTML file that needs no other; whole or not at all."""
        title = html.escape(self._title)
        text = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(self._parts) + "\n</body></html>\n"
        )
        with replacing(Path(path)) as partial:
            partial.write_text(text, encoding="utf-8")


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
