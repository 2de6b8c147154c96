"""The Python examples of the README and of the pages without files of their own run as printed; what they link to is there."""

import re
from pathlib import Path

import pytest

from docs.pictures.parts import draw

ROOT = Path(__file__).parents[2]
README, *PAGES = (
    re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.S)
    for name in ("README.md", "docs/engine.md", "docs/how-to.md")
)
MARKDOWN = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("block", sum(PAGES, README), ids=lambda block: block.split("\n")[-2][:40])
def test_the_examples_run(
    block: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where an example writes
    exec(compile(block, "example", "exec"), {})
    if "plan" in block:
        assert "tile" in capsys.readouterr().out


def test_there_are_examples() -> None:
    assert len(README) >= 2


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", _without_code(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_picture_of_the_parts_is_that_of_their_contract() -> None:
    assert (ROOT / "docs" / "pictures" / "parts.svg").read_text(encoding="utf-8") == draw(), (
        "python -m docs.pictures.parts"
    )


def _anchors(page: Path) -> set[str]:
    """Names of headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", _without_code(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
