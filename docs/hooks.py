"""Hooks of the site: pages of the root of the repository, and links out of `docs/`.

Links between pages are relative to files, so that GitHub follows them too. On the site those to files that are no pages lead to the
repository (`repo_url`); without one, as in a build on your own machine, their text is left.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files at the root that the site shows, and the names of their pages."""
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root."""
    for file, page in PAGES.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to files at the root to their pages, and those to files that are no pages to the repository."""
    folder = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        inside = path.removeprefix("../")  # seen from the root of the repository
        if files.get_file_from_path(path) or not (ROOT / inside).exists():
            return match[0]
        if inside in PAGES:
            return f"[{match[1]}]({posixpath.relpath(PAGES[inside], folder or '.')}{match[3] or ''})"
        return f"[{match[1]}]({config.repo_url}/blob/main/{inside})" if config.repo_url else match[1]

    return LINK.sub(link, markdown)
