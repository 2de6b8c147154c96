"""The Python examples of the README and of the engine's page run as printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README, ENGINE = (
    re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.S)
    for name in ("README.md", "docs/engine.md")
)


@pytest.mark.parametrize("block", README + ENGINE, ids=lambda block: block.split("\n")[-2][:40])
def test_the_examples_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "example", "exec"), {})
    if "plan" in block:
        assert "tile" in capsys.readouterr().out


def test_there_are_examples() -> None:
    assert len(README) >= 2
