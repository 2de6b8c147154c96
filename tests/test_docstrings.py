"""The examples of docstrings run as printed, in a folder with small slides, and give what they say."""

import doctest
import importlib
from pathlib import Path

import lightning.pytorch
import numpy as np
import pytest
import torch
import torchvision

import widefield
from tests.slides import write_slides

SOURCE = Path(widefield.__file__).parent
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
KNOWN = {
    "lightning": lightning,
    "nn": torch.nn,
    "np": np,
    "torch": torch,
    "torchvision": torchvision,
    "wf": widefield,
    "widefield": widefield,
}
"""What examples take for imported, beside the names of their own module."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("examples")
    write_slides(root, 2, 512)
    (root / "images").rename(root / "slides")
    table = (root / "evaluation" / "reference.csv").read_text(encoding="utf-8")
    (root / "labels.csv").write_text(table.replace("class", "label", 1), encoding="utf-8")
    return root


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_examples_give_what_they_say(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    name = ".".join(["widefield", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
    module = importlib.import_module(name)
    told: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs=KNOWN):
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append)
    assert not told, "".join(told)
