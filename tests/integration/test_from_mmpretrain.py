"""The page that leads from MMPretrain: its files, commands and code are run as printed, and its table of errors is what is said.

`python -m tests.integration.test_from_mmpretrain` writes the table into the page anew.
"""

import contextlib
import io
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.small_images import write_folder, write_image
from widefield.cli import VERBS, main
from widefield.cli.fit_sections import SECTIONS
from widefield.components.metrics import METRICS
from widefield.components.preprocessors.batch_augments import BATCH_AUGMENTS
from widefield.inference import get_model
from widefield.registry import MODELS, arguments_of, import_module_or_file

PAGE = Path(__file__).parents[2] / "docs" / "from-mmpretrain.md"
MARKS = "<!-- what `widefield config check` says -->\n", "<!-- end -->\n"
FENCE = re.compile(r"(?:`([\w.]+)`:\n\n)?```(\w+)\n(.*?)```", flags=re.S)

WRONG = [
    "model.backbone.depht=34",
    "model.bacbone.depth=34",
    "modle.backbone.depth=34",
    "model.backbone.depth=19",
    "model.backbone.depth='34'",
    "model.backbone.type=SmallStemResNt",
    "model.neck.type=CrossEntropyLoss",
    "model.backbone={_delete_: true, depth: 18}",
    "model.head={_delete_: true, type: LinearClsHead, num_classes: 2}",
    "model.head.num_classes=two",
    "model.head.num_classes=null",
    "model.head.num_classes=-5",
    "model.head.topk=[0]",
    "model.head.cal_acc=yes",
    "model.head.loss.mode=orginal",
    "model.head.loss.label_smooth_val=1",
    "model.head.loss.type=LabelSmothLoss",
    "model.head.loss.type=CrossEntropyLoss model.head.loss.label_smooth_val=0.2",
    "model.backbone.out_indices=2",
    "model.backbone.out_indices=[3]",
    "model.backbone.norm_cfg.type=BM",
    "model.backbone.norm_cfg.epsilon=1e-3",
    "model.backbone.init_cfg={type: Pretrained, checkpoint: r.pth, prefx: backbone}",
    "model.pretrained=r.pth",
    "model.backbone.init_cfg={type: Pretrained, checkpoint: 'torchvision://resnet43'}",
    "model.backbone.streaming.tile=512",
    "model.data_preprocessor.mean=[0, 0]",
    "model.train_cfg={augments: [{type: Mixup, alpha: 1.0, prob: 0.5}]}",
    "model.neck=GlobalAveragePooling",
    "model.neck.dim=4",
    "model.type=torch.nn.Linear",
    "data.train.type=ImageFoldr",
    "data.train.transforms.0.size=large",
    "data.train.transforms.2.size=8",
    "data.train.transforms.1.p=2",
    "data.batchsize=8",
    "data.batch_size=0",
    "data.num_workers=-1",
    "metrics=[{type: Acuracy}]",
    "optimizer.type=SDG",
    "optimizer.lr=fast",
    "optimizer.lr=-0.1",
    "optimizer.momentun=0.9",
    "paramwise_cfg.norm_decay=0",
    "paramwise_cfg={custom_keys: {haed: {lr_mult: 10.0}}}",
    "lr_scheduler.type=CosineAnealingLR",
    "lr_scheduler.T_max=0",
    "lr_scheduler=[{type: LinearLR, end: 2}, {type: CosineAnnealingLR, T_max: 8, begin: 3}]",
    "trainer.max_epoch=3",
    "trainer.max_epochs=many",
    "trainer.max_epochs=-5",
    "trainer.accumulate_grad_batches=0",
    "trainer.callbacks.0.patiense=3",
    "trainer.callbacks=[{type: EarlyStoping, monitor: val_loss}]",
    "seed_everything=x",
    "train_dataloader.batch_size=8",
]
"""Overrides of the page's my.yaml."""

WRONG_FILES = {
    "wrong.yaml": [
        "{_base_: wrong.yaml}",
        "{_base_: my.yaml, optimizer: {lr: 1e-3, lr: 1e-4}}",
        "{_base_: my.yaml, trainer: {max_epochs: {most: 9}}}",
        "{_base_: my.yaml, trainer: {callbacks: {3: {patience: 9}}}}",
        "{_base_: [my.yaml, other.yaml]}",
        "{_base_: my.yaml, learning_rate: 0.1}",
    ],
    "wrong.py": [
        "_base_ = 'my.yaml'; model = dict(neck=object())",
        "_base_ = 'my.yaml'; trainer = dict(max_epochs=epochs)",
    ],
}
"""Files, each with its whole text; other.yaml says that `trainer.max_epochs` is 9."""


def blocks() -> list[tuple[str, str, str]]:
    """File, language and text of each block of the page."""
    return FENCE.findall(PAGE.read_text(encoding="utf-8"))


def write_files(folder: Path) -> None:
    for name, _, text in blocks():
        if name:
            (folder / name).write_text(text, encoding="utf-8")
    (folder / "other.yaml").write_text("trainer: {max_epochs: 9}\n")


def said(*line: str) -> str:
    """What `widefield config check` answers, without where the value was written."""
    answer = io.StringIO()
    with contextlib.redirect_stderr(answer):
        assert main(["config", "check", *line, "--imports", "my_models.py"]) == 1, line
    lines = answer.getvalue().splitlines()
    assert len(lines) == 1, f"{line} is answered by {len(lines)} lines"
    return re.sub(r" \((?:override |my\.|wrong\.)[^()]*(?:\([^()]*\))*[^()]*\)$", "", lines[0])


def table() -> str:
    """The table of the page, computed in a folder with its files; all necks are not named, as there may be new ones."""
    rows = [(text, said("my.yaml", *re.split(r" (?=model)", text))) for text in WRONG]
    for file, texts in WRONG_FILES.items():
        for text in texts:
            Path(file).write_text(text + "\n", encoding="utf-8")
            rows.append((text, said(file)))
    lines = "".join(f"| `{given}` | `{answer}` |\n" for given, answer in rows)
    return "| given | answer |\n|---|---|\n" + re.sub(r"(expected a neck: ).*", r"\1...` |", lines)


@contextlib.contextmanager
def forgotten() -> Iterator[None]:
    """The user's components are not known behind this, nor before."""
    before, modules = dict(MODELS._registered), sys.modules.pop("my_models", None)
    try:
        yield
    finally:
        MODELS._registered = before
        sys.modules.pop("my_models", None)
        if modules is not None:
            sys.modules["my_models"] = modules


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    with forgotten():
        yield tmp_path


def write_images(folder: Path) -> None:
    """What the page's configurations name: two folders of classes, and slides with their table."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(("cats", "dogs")):
            of_class = folder / "images" / split / name
            of_class.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 100, (32, 32, 3), dtype=np.uint8) + np.uint8(150 * label)
                write_image(of_class / f"{name}_{index}.png", pixels)
    images, _ = write_folder(folder / "made")
    images.rename(folder / "slides")
    (folder / "made" / "labels.csv").rename(folder / "labels.csv")


def test_the_table_of_errors_is_what_is_said(folder: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    assert text[start:end] == table(), f"the page is of yesterday; write its table anew: {__doc__}"
    assert len(WRONG) >= 20


def test_commands_and_code_run_as_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(folder)
    for name, language, text in blocks():
        if name:
            continue
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
        for line in text.splitlines() if language == "sh" else ():
            command, *arguments = shlex.split(line, comments=True)
            assert command == "widefield"
            assert main(arguments) == 0, line
    assert (folder / "runs/first/history.csv").read_text().count("\n") == 1 + 4
    shown = capsys.readouterr().out
    assert "test_accuracy/top1" in shown
    assert (folder / "predictions/predictions.csv").read_text().count("\n") == 1 + 3
    assert (folder / "runs/slides/best.ckpt").is_file()


def section(title: str) -> list[tuple[str, str]]:
    """The rows of a table: what is there, and what is here."""
    text = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    return [(theirs.removeprefix("| "), ours.removesuffix(" |")) for theirs, ours in cells[1:]]


SIGNATURES: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "mmpretrain_signatures.json").read_text(encoding="utf-8")
)
"""The arguments of MMPretrain 1.2's classes with their defaults; ["required"] for those that have none."""


def differences() -> set[str]:
    """Arguments, as Class.argument, that are not here, or have another default, but for `init_cfg`."""
    found = set()
    for name, theirs in SIGNATURES.items():
        registry = next(one for one in (MODELS, METRICS, BATCH_AUGMENTS) if name in one)
        arguments = arguments_of(registry.get(name)).named
        ours = {key: ["required"] if one.required else one.default for key, one in arguments.items()}
        plain = json.loads(json.dumps(ours, default=repr))
        found |= {f"{name}.{key}" for key, default in theirs.items() if plain.get(key, plain) != default}
    return {one for one in found if not one.endswith(".init_cfg")}


def test_the_page_names_every_argument_that_differs_and_no_other() -> None:
    rows = section("Arguments that differ")
    named = [one for names, _ in rows for one in re.findall(r"`([\w-]+\.\w+)`", names)]
    assert sorted(named) == sorted(differences())
    assert len(SIGNATURES) > 60


def test_every_component_with_a_name_of_theirs_is_on_the_page() -> None:
    named = set(re.findall(r"`([\w-]+)[(`]", "".join(theirs + ours for theirs, ours in section("Names"))))
    assert set(MODELS.index) & set(SIGNATURES) <= named


@pytest.mark.parametrize("title", ["Configurations", "Names", "Tools"])
def test_every_entry_and_verb_on_the_page_exists(title: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = " ".join(ours for _, ours in section(title))
    import_module_or_file("my_models.py")
    torch.save(get_model("my.yaml").state_dict(), "FILE")
    entries = [one for one in re.findall(r"`([a-z_.]+=[^`]+)`", ours) if re.split(r"[.=]", one)[0] in SECTIONS]
    for entry in entries:
        assert main(["config", "check", "my.yaml", "--imports", "my_models.py", entry]) == 0, entry
    assert set(re.findall(r"`widefield (\w+)", ours)) <= set(VERBS)
    assert entries or title == "Tools"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        write_files(Path(name))
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        PAGE.write_text(f"{before}{MARKS[0]}{table()}{MARKS[1]}{after}", encoding="utf-8")
