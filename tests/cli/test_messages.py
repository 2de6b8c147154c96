"""Common failures of every verb, as people meet them: each tells what was given, what was expected, and what to do next."""

import errno
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.label_files import write_label_map, write_segmented
from widefield.cli import VERBS, main
from widefield.models import Classifier

FIT = "fit --images images --labels labels.csv --model resnet18_w8 --out new"
SEGMENT = "fit --task segment --images images --masks masks --model timm/test_resnet --out new"
PREDICT = "predict --checkpoint run/last.ckpt --out new"
PRETRAIN = "pretrain --out new --data images --model torchvision/resnet18"
EXPORT = "export --checkpoint run/last.ckpt --out new.pt"

MESSAGES = {
    # the command itself
    "tarin": r"invalid choice: 'tarin' \(choose from .*fit",
    "demo --seed x": r"argument --seed: got 'x', expected a whole number, as in 3",
    # fit: what is missing or cannot be read
    "fit": r"give --images DIR.*; --labels TABLE.*; --model NAME.*; --out DIR.*; or a configuration with --config FILE",
    "fit --images images --model resnet18_w8 --out new": r"give --labels TABLE, a CSV or Parquet file with a row per image",
    "fit --task segment --images images --model timm/test_resnet --out new": r"give --masks DIR, a folder of label maps",
    f"{FIT} --images nowhere": r"the folder of images nowhere does not exist; check --images",
    f"{FIT} --images empty": r"empty is empty; check --images",
    f"{FIT} --labels nothing.csv": r"nothing\.csv does not exist; give a label table, a CSV file with the columns",
    f"{FIT} --labels columns.csv": r"no column 'image'; its columns are picture, kind\. Name the one .*\{image: picture\}",
    f"{FIT} --columns '{{label: grade}}'": r"no column 'grade' .*its columns are image, label",
    f"{FIT} --labels absent.csv": r"1 image\(s\) that are not in .*: im9\.png \(line 6\); correct the paths in the table, or",
    f"{FIT} --labels one.csv": r"every image has the label 'a'; training needs at least two classes; choose another column",
    f"{FIT} --labels twice.csv": r"names im0\.png 2 times, in lines 2, 6; keep one of them",
    f"{FIT} --spacing 0.5": r"spacing=0\.5 was asked for of .*\.png, which does not say its own; give level=\.\.\. instead",
    f"{FIT} --level 7": r"level 7 of .*\.png does not exist; its levels \(height x width\) are 0: 64x72",
    f"{FIT} --weights none.pt": r"--weights: none\.pt does not exist; name a file of weights, DEFAULT .*, or leave it out",
    f"{FIT} --weights other.pt": r"other\.pt is not for this network \(NarrowResNet\): it lacks .*; give weights of the same",
    # fit: names and values
    f"{FIT} --model resnet19": r"there is no model 'resnet19'; did you mean resnet18",
    f"{FIT} --model timm/resnet19": r"there is no model 'timm/resnet19'; did you mean timm/resnet18",
    f"{FIT} --pooling attention": r"--pooling: got 'attention', expected one of 'average', 'max'",
    f"{FIT} --foreground tissue": r"the foreground tissue does not exist; give auto, none, otsu, hsv, a GeoJSON file",
    f"{FIT} --task grading": r"invalid choice: 'grading' \(choose from .*segment",
    f"{FIT} --memory-budget lots": r"memory_budget='lots' is not a size: give bytes, or text such as '6GiB'",
    f"{FIT} --epochs many": r"argument --epochs: got 'many', expected a whole number, at least 0, as in 20",
    f"{FIT} --epochs -1": r"argument --epochs: got '-1', expected a whole number, at least 0",
    f"{FIT} --lr fast": r"argument --lr: got 'fast', expected a number, as in 0\.25",
    f"{FIT} --batch-size 0": r"--batch-size: got 0, expected int, at least 1",
    f"{FIT} --tile-size 0": r"tile_size=0 must be a positive int, \(height, width\)",
    f"{FIT} --epoch 3": r"there is no flag --epoch; did you mean --epochs\?",
    f"{FIT} model.poolin=max": r"model\.poolin: there is no 'poolin'; did you mean pooling\?",
    f"{FIT} --lora 4": r"lora=4 is for encoders of patches, and resnet18_w8 is none; give patches:timm/NAME",
    f"{FIT} --classes '[a, b]'": r"--classes is for label maps; add --task segment, or leave it out",
    f"{FIT} --imports nowhere.py": r"there is no file .*nowhere\.py; there are ",
    f"{FIT} --imports boom.py": r"boom\.py cannot be run: ZeroDivisionError: division by zero; `python .*boom\.py` shows where",
    # fit: where results go
    f"{FIT} --out run": r"run already holds a run; continue it with --resume, or name another folder with --out DIR",
    f"{FIT} --out labels.csv": r"labels\.csv is a file; name a folder with --out DIR",
    "fit --resume --out empty": r"no run to resume in empty: .* does not exist; name the folder .*or leave --resume out",
    "fit --resume": r"--resume continues the run in a folder; name it with --out DIR",
    # fit: configurations
    "fit --config nothing.yaml --out new": r"the configuration .*nothing\.yaml does not exist; did you mean",
    "fit --config broken.yaml --out new": r"broken\.yaml, line 2: .*; correct the YAML there, or in the line before",
    "fit --config wrong.yaml --out new": r"no model named 'ImageClasifier'; did you mean ImageClassifier or .*\(wrong\.yaml, line",
    # fit: label maps
    f"{SEGMENT} --masks small": r"small/im0\.png has 9 x 9 pixels, and its image .*64 x 72; give one of the same size",
    f"{SEGMENT} --masks empty": r"no image in .* has a label map in .*empty: that of a\.tif is a\.png",
    f"{SEGMENT} --model resnet18": r"there is no model 'resnet18'; did you mean timm/resnet18",
    # predict
    f"{PREDICT}": r"the following arguments are required: IMAGES",
    f"{PREDICT} --checkpoint none.ckpt images": r"the checkpoint none\.ckpt does not exist; name a \.ckpt file, or the folder",
    f"{PREDICT} --checkpoint text.ckpt images": r"text\.ckpt cannot be read .*; it is another kind of file, or truncated",
    f"{PREDICT} --checkpoint empty images": r"empty/best\.ckpt does not exist; name a \.ckpt file, the folder of a run",
    f"{PREDICT} --checkpoint other.pt images": r"other\.pt does not say what its model is; .*--config FILE",
    f"{PREDICT} empty": r"the folder empty holds no image files; they end in .*can be named itself",
    f"{PREDICT} nope.png": r"cannot read nope\.png: there is no such file",
    f"{PREDICT} bad.png": r"cannot read bad\.png: its content is none of .*; convert it to one of these",
    f"{PREDICT} grey.png": r"grey\.png has 1 channel\(s\) of uint8, and the model was trained on 3 of uint8.*; convert the image",
    f"{PREDICT} images --heatmap jpg": r"'jpg' is no format; give some of png, tiff, geojson, with commas",
    f"{PREDICT} images --tta flip": r"got 'flip'; give hflip, vflip and crop=SIDE, separated by commas",
    f"{PREDICT} images --out labels.csv": r"labels\.csv is a file; name a folder with --out DIR",
    # pretrain, export, embed
    "pretrain --out new": r"give --data, --model; `widefield pretrain --help` says what they take",
    f"{PRETRAIN} --data nowhere": r"data: nowhere does not exist; name a folder of images",
    f"{PRETRAIN} --model resnet18": r"'resnet18' must be written package/name, .*did you mean torchvision/resnet18",
    f"{PRETRAIN} --method simclear": r"method: no method named 'simclear'; did you mean simclr\?",
    f"{PRETRAIN} --out images": r"images is not empty! Set overwrite=True \(--overwrite\) .*=True \(--resume\)",
    f"{PRETRAIN} --out labels.csv": r"labels\.csv is not a directory! Name a folder with out \(--out DIR\)",
    f"{PRETRAIN} epoch=3": r"there is no argument 'epoch'; did you mean epochs\?",
    f"{EXPORT} --checkpoint none.ckpt": r"checkpoint: none\.ckpt does not exist; name a \.ckpt file",
    f"{EXPORT} --out labels.csv": r"labels\.csv already exists! Set overwrite=True .*\(--overwrite\), or name another",
    f"{EXPORT} --format tensorrt": r"format: got 'tensorrt', expected one of .*'onnx', 'torch_export'",
    f"{EXPORT} --part adapters": r"run/last\.ckpt has none; `widefield fit --lora RANK` trains them",
    f"{EXPORT} --checkpoint components.ckpt": r"was not written by widefield\.train; give a \.ckpt file .*get_model\(FILE\)",
    f"{EXPORT} --out labels.csv/new.pt": r"labels\.csv: File exists; a file is where a folder should be: remove it, or",
    "embed --out new.pt --data images --checkpoint run/last.ckpt --format json": r"format: got 'json', expected one of 'torch'",
    "embed --patches --out new --data images --model timm/resnet18": r"model='timm/resnet18' must be patches:timm/NAME",
    # looking at images, models, names and configurations
    "doctor --images empty": r"the folder empty holds no images; name another with --images",
    "check nonsense": r"MODEL is 'nonsense'; give my_file\.py:model, package\.module:attribute, timm/NAME or torchvision/NAME",
    "check parts.py:missing": r"parts\.py has no 'missing'; there are net",
    "plan parts.py:net --size 0x5": r"'0x5' is not a size; give height and width as in 97x113",
    "plan parts.py:net --size 90x90 --batch 0": r"got '0', expected a whole number, at least 1",
    "plan parts.py:net --size 90x90 --memory-budget 1KiB": r"budget of 1 KiB is too small for .*: the smallest that works is",
    "bench --model timm/resnet19": r"there is no model 'timm/resnet19'; did you mean timm/resnet18",
    "bench --model parts.py:net --budget lots": r"--budget: 'lots' is no share such as 1/4, and no size such as 2GiB",
    "list wat": r"invalid choice: 'wat' \(choose from .*models",
    "help Resnet": r"no component named 'Resnet'; did you mean ResNet",
    "config check nothing.yaml": r"the configuration .*nothing\.yaml does not exist; did you mean",
    "test": r"which model\? name the folder of a run with --run DIR, or give --config FILE and --checkpoint CKPT",
    "test --run run": r"there is no run in run: .*config\.yaml does not exist; name a folder that `widefield fit` wrote",
    "validate --run nowhere": r"there is no run in nowhere, which does not exist; name a folder that `widefield fit` wrote",
    "visualize": r"the following arguments are required: PICTURE",
    "visualize cam images --checkpoint run/last.ckpt --class zebra --out new": r"there is no class 'zebra'; the classes are a, b",
}
"""Of a command line, what it shows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, tables, label maps, configurations and checkpoints, good and bad."""
    folder: Path = tmp_path_factory.mktemp("messages")
    write_segmented(folder)
    for name in ("empty", "run"):
        (folder / name).mkdir()
    rows = [f"im{k}.png,{'ab'[k % 2]}" for k in range(4)]
    tables = {
        "labels": ["image,label", *rows],
        "columns": ["picture,kind", *rows],
        "absent": ["image,label", *rows, "im9.png,a"],
        "one": ["image,label", *(row.replace(",b", ",a") for row in rows)],
        "twice": ["image,label", *rows, "im0.png,b"],
    }
    texts = {
        **{f"{name}.csv": "\n".join(lines) for name, lines in tables.items()},
        "bad.png": "no image",
        "text.ckpt": "no checkpoint",
        "broken.yaml": "model: {type: [\n",
        "wrong.yaml": "model: {type: ImageClasifier}\n",
        "parts.py": "import torch\nnet = torch.nn.Conv2d(3, 2, 3)\n",
        "boom.py": "1 / 0\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for k in range(4):
        write_label_map(folder / "small" / f"im{k}.png", np.zeros((9, 9) if k == 0 else (64, 72), np.uint8))
    Image.fromarray(np.zeros((64, 72), np.uint8)).save(folder / "grey.png")
    model = Classifier("resnet18_w8", ["a", "b"])
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "epoch": 0, "global_step": 1}
    data = {"class_names": ["a", "b"], "pixels": (3, "uint8")}
    lightning = {"pytorch-lightning_version": "2.5"}
    torch.save({**content, **lightning, "LabelledImages": data}, folder / "run" / "last.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {}, **lightning}, folder / "components.ckpt")
    torch.save({"conv1.weight": torch.zeros(3)}, folder / "other.pt")
    return folder


@pytest.fixture
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder as the current one; nothing is made in it."""
    monkeypatch.chdir(folder)
    before = sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    yield folder
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts) == before


def shown(line: str, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command line, and its error on one line."""
    try:
        code: Any = main(shlex.split(line))
    except SystemExit as exit:  # of argparse
        code = exit.code
    text = " ".join(capfd.readouterr().err.split())
    assert "Traceback" not in text
    return code, text.partition("error: ")[2]


@pytest.mark.parametrize("line", MESSAGES)
def test_a_common_failure_tells_what_was_given_and_what_to_do(
    line: str, there: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, message = shown(line, capfd)
    assert code == 2
    assert re.search(MESSAGES[line], message), message


def test_every_verb_has_a_failure_in_the_table() -> None:
    assert {line.split()[0] for line in MESSAGES} >= VERBS.keys()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "new.pt: No space left on device; free some space there, or name another place"),
        (errno.EACCES, "new.pt: Permission denied; change its permissions, or name another place"),
        (errno.EROFS, "new.pt: Read-only file system; change its permissions, or name another place"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_named_with_what_to_do(
    number: int, message: str, there: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert shown(f"{EXPORT} --format safetensors", capfd) == (2, message)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    there: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    expected = "format=onnx needs onnxruntime, which is not installed; run: pip install 'widefield[onnx]'"
    assert shown(f"{EXPORT} --format onnx", capfd) == (2, expected)


def test_a_model_on_the_hub_that_cannot_be_fetched_is_told_with_what_to_do(
    there: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise FileNotFoundError("404 Client Error")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    code, message = shown("predict --checkpoint hf-hub:no/one --out new images", capfd)
    assert code == 2 and "hf-hub:no/one cannot be fetched" in message and "give the folder" in message
