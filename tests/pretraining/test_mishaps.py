"""What may happen to a run: a full disk, signals, damaged files, another run. Nothing is lost, and a message says what to do."""

import logging
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data
from torch import Tensor

import widefield
from tests.pretraining.tiny import (
    TinyWrapper,
    assert_same,
    checkpoint,
    exported,
    losses,
    metrics,
    train,
    write_images,
)
from tests.small_images import write_tiff
from widefield.images import ImageReadError
from widefield.modules import NotFiniteError
from widefield.pretraining.out import OutFolder
from widefield.pretraining.slides import SlideArgs
from widefield.pretraining.source import Files, Slides

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs Linux")


class Then(TinyWrapper):
    """Does something in the training step after `steps` others."""

    def __init__(self, steps: int, action: Any) -> None:
        super().__init__()
        self.left, self.action = steps, action

    def forward_features(self, x: Tensor) -> dict[str, Any]:
        if self.training:
            self.left -= 1
            if self.left == -1:
                self.action()
        return super().forward_features(x)


def partial(path: Path) -> Path:
    """What is written before it takes the place of `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def on_a_full_disk(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(FULL)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run of 3 epochs, of 2 steps each."""
    out = tmp_path_factory.mktemp("unbroken")
    train(out, images, epochs=3)
    return out


@pytest.mark.parametrize(
    "name", ["checkpoints/last.ckpt", "checkpoints/epoch=1-step=4.ckpt", "exported_models/exported_last.pt"]
)
def test_a_full_disk_leaves_what_was_there_and_the_run_goes_on_later(
    name: str, images: Path, unbroken: Path, tmp_path: Path
) -> None:
    message = (
        r"No space left on device to write .*: the run ended in step 4; resume_interrupted=True goes on at step 2, "
    )
    with pytest.raises(OSError, match=message):
        train(tmp_path, images, epochs=3, model=Then(3, lambda: on_a_full_disk(partial(tmp_path / name))))
    assert checkpoint(tmp_path)["global_step"] == 2 and exported(tmp_path)
    assert not list(tmp_path.rglob(".*"))
    assert_goes_on(tmp_path, images, unbroken)


def assert_goes_on(out: Path, images: Path, unbroken: Path) -> None:
    train(out, images, epochs=3, resume_interrupted=True)
    assert_same(dict(exported(out)), dict(exported(unbroken)))
    assert losses(out) == losses(unbroken)


def test_a_loss_that_is_no_number_ends_a_run_and_leaves_what_was_finite(
    images: Path, unbroken: Path, tmp_path: Path
) -> None:
    model = Then(3, lambda: model.model[0].weight.data.fill_(float("nan")))
    message = r"the loss of step 4 \(epoch 2\) is NaN or infinite.*resume_interrupted=True goes on at step 2, .*checkpoint=\.\.\."
    with pytest.raises(NotFiniteError, match=message):
        train(tmp_path, images, epochs=3, model=model)
    assert checkpoint(tmp_path)["global_step"] == 2
    for state in (exported(tmp_path), checkpoint(tmp_path)["state_dict"]):
        assert all(value.isfinite().all() for value in state.values())
    assert_goes_on(tmp_path, images, unbroken)


def test_numbers_that_find_no_space_end_a_run_with_a_message(images: Path, tmp_path: Path) -> None:
    fill = Then(0, lambda: on_a_full_disk(tmp_path / "metrics.jsonl"))
    with pytest.raises(OSError, match=r"No space left .* the run ended in step 1; it has written no checkpoint yet$"):
        train(tmp_path, images, model=fill, callbacks={"quality": None})


def test_a_log_and_a_page_that_find_no_space_end_nothing(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    on_a_full_disk(tmp_path / "train.log")
    fill = Then(0, lambda: on_a_full_disk(partial(tmp_path / "report.html")))
    train(tmp_path, images, model=fill, callbacks={"report": {}, "quality": None}, resume_interrupted=True)
    assert exported(tmp_path) and not (tmp_path / "report.html").exists()
    assert "the report could not be written: OSError: [Errno 28] No space left on device" in caplog.text
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("format", ["torch", "csv", "parquet", "torch_state_dict", "safetensors", "torch_model"])
def test_exports_and_embeddings_that_find_no_space_leave_the_old_file(
    format: Any, images: Path, unbroken: Path, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    on_a_full_disk(partial(path))
    common: dict[str, Any] = {"format": format, "model": TinyWrapper(), "overwrite": True}
    last = unbroken / "checkpoints" / "last.ckpt"
    with pytest.raises(OSError, match=r"No space left on device"):
        if format in ("torch", "csv", "parquet"):
            widefield.embed(path, images, last, image_size=16, num_workers=0, accelerator="cpu", **common)
        else:
            widefield.export(path, last, **common)
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [(signal.SIGINT, KeyboardInterrupt, "interrupted in"), (signal.SIGTERM, SystemExit, "told to end by SIGTERM in")],
)
def test_a_run_that_is_told_to_end_saves_the_step_that_it_is_in(
    number: Any, error: Any, words: str, images: Path, unbroken: Path, tmp_path: Path
) -> None:
    """In the first step of the second epoch, of a run without workers."""
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

    def tell() -> None:
        os.kill(os.getpid(), number)

    with pytest.raises(error) as caught:
        train(tmp_path, images, epochs=3, model=Then(2, tell))
    assert getattr(caught.value, "code", 143) == 143
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    assert checkpoint(tmp_path)["global_step"] == 3
    assert f"{words} step 3; resume_interrupted=True goes on at step 3" in (tmp_path / "train.log").read_text()
    assert_goes_on(tmp_path, images, unbroken)


def test_the_second_signal_ends_a_run_at_once(images: Path, tmp_path: Path) -> None:
    def tell_twice() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, images, model=Then(1, tell_twice))
    assert "interrupted in step 1; it has written no checkpoint yet" in (tmp_path / "train.log").read_text()


def test_an_error_is_in_the_log_with_what_to_do(images: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train(tmp_path, images, epochs=2, model=Then(3, fail))
    log = (tmp_path / "train.log").read_text()
    assert "KeyError ended the run in step 3; resume_interrupted=True goes on at step 2" in log and "Traceback" in log


def test_another_run_in_the_folder_is_told_before_anything_else(images: Path, tmp_path: Path) -> None:
    for mode in ({}, {"overwrite": True}, {"resume_interrupted": True}):
        with OutFolder(tmp_path / "out").opened(clear=False):
            (tmp_path / "out" / "kept").touch()
            with pytest.raises(ValueError, match=r"another run is writing to .*; wait for its end, or name another"):
                train(tmp_path / "out", "nowhere", **mode)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]


def test_a_bad_image_in_every_batch_is_replaced_listed_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_images(tmp_path / "images", 12)
    for k in range(4):
        (folder / f"bad{k}.png").write_text("no image")
    train(tmp_path / "out", folder, epochs=3, num_workers=2)
    assert checkpoint(tmp_path / "out")["global_step"] == 12
    assert len((tmp_path / "out" / "bad_images.csv").read_text().splitlines()) == 5
    told = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 2 and "skipped an image: cannot read" in told[0] and "lists all" in told[0]
    assert "4 images could not be read" in told[1]
    assert metrics(tmp_path / "out")[-1].get("bad_images", 4) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fatal_image_is_told_in_a_line_by_workers_too(workers: int, images: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ImageReadError, match=r"^cannot read .*bad\.png: .*$"):
        train(
            tmp_path / "out", [images, tmp_path / "bad.png"], batch_size=11, on_bad_image="raise", num_workers=workers
        )


def test_damaged_files_of_all_formats_are_bad_images_and_no_other_error(tmp_path: Path) -> None:
    """Cut off, or with bytes changed in the head or anywhere."""
    picture = data.astronaut()[:40, :40]
    for name in ("a.png", "b.jpg", "c.bmp", "d.ppm", "e.webp", "f.tif"):
        Image.fromarray(picture).save(tmp_path / name)
    np.save(tmp_path / "g.npy", picture)
    write_tiff(tmp_path / "h.tif", picture)
    damaged = 0
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for k in range(30):
            draw, content = random.Random(k), bytearray(whole)
            for _ in range(draw.randrange(1, 8) if k % 3 else 0):
                content[draw.randrange(min(len(whole), 200 if k % 3 == 1 else len(whole)))] = draw.randrange(256)
            path.write_bytes(content if k % 3 else content[: draw.randrange(len(whole))])
            for source in (Files((path,), 3), Slides((path,), 3, SlideArgs(16, foreground=False))):
                try:
                    assert source.read(0, draw).shape[0] == 3
                except OSError as error:
                    damaged += 1
                    assert str(path) in str(error)
    assert damaged > 150
