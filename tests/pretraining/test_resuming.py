"""A run that goes on, and the folder that it has for itself."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from tests.fresh import fresh
from tests.pretraining.tiny import TinyWrapper, assert_same, checkpoint, exported, files, losses, metrics, train
from widefield.pretraining import trainer
from widefield.pretraining.out import OutFolder

FORK = multiprocessing.get_context("fork")
"""Without the seconds that another interpreter takes to import torch."""


def killed_run(out: Path, images: Path, method: str, kill_at: int, options: dict[str, Any]) -> int:
    """A run in a process that is killed at the start of the step after `kill_at` steps; its exit code."""

    class Kill(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        make = trainer.make_callbacks
        trainer.make_callbacks = lambda *args: [*make(*args), Kill()]
        train(out, images, method, **options)

    process = FORK.Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@fresh
def test_a_killed_run_goes_on_at_the_step_as_if_nothing_had_been(tmp_path: Path, images: Path) -> None:
    """5 batches an epoch: killed at the start of the last step of the second epoch, and in its second step, of two batches.

    DenseCL has most to keep: queues and moving copies. Dropout draws random numbers in the model.
    """
    every_two: dict[str, Any] = {"callbacks": {"model_checkpoint": {"every_n_train_steps": 2}}}
    compare_with_unbroken("densecl", 9, 8, every_two, tmp_path / "densecl", images)
    always = {"callbacks": {"model_checkpoint": {"every_n_minutes": 0}}, "gradient_accumulation_steps": 2}
    compare_with_unbroken("dino", 4, 4, always, tmp_path / "dino", images)


def compare_with_unbroken(
    method: str, kill_at: int, saved: int, options: dict[str, Any], tmp_path: Path, images: Path
) -> None:
    options = {"epochs": 3, "batch_size": 2, "model": TinyWrapper(dropout=0.5), **options}
    train(tmp_path / "unbroken", images, method, **{**options, "model": TinyWrapper(dropout=0.5)})
    assert killed_run(tmp_path / "broken", images, method, kill_at, options) == -signal.SIGKILL
    assert checkpoint(tmp_path / "broken")["global_step"] == saved
    train(tmp_path / "broken", images, method, resume_interrupted=True, **options)
    left, right = checkpoint(tmp_path / "broken"), checkpoint(tmp_path / "unbroken")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "widefield"):
        assert_same(left[key], right[key], key)
    assert_same(dict(exported(tmp_path / "broken")), dict(exported(tmp_path / "unbroken")))
    assert f"step {saved}" in (tmp_path / "broken" / "train.log").read_text()


def test_the_last_checkpoint_is_the_finished_model_whatever_the_steps_between(tmp_path: Path, images: Path) -> None:
    by_steps: dict[str, Any] = {"batch_size": 2, "callbacks": {"model_checkpoint": {"every_n_train_steps": 2}}}
    train(tmp_path / "out", images, epochs=1, **by_steps)
    last = checkpoint(tmp_path / "out")
    assert last["global_step"] == 5
    kept = {name: value for name, value in last["state_dict"].items() if ".embedding." in name}
    for name, value in exported(tmp_path / "out").items():
        assert any(key.endswith(f".{name}") and torch.equal(value, other) for key, other in kept.items())
    train(tmp_path / "out", images, epochs=2, resume_interrupted=True, **by_steps)
    assert [step for step, _ in losses(tmp_path / "out")] == [4, 9]
    assert checkpoint(tmp_path / "out")["global_step"] == 10


def test_max_steps_ends_a_resumed_run_and_broken_lines_of_metrics_go(tmp_path: Path, images: Path) -> None:
    options: dict[str, Any] = {"batch_size": 2, "trainer_args": {"max_steps": 12}}
    train(tmp_path / "out", images, epochs=2, **options)
    with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train_l')
    train(tmp_path / "out", images, epochs=3, resume_interrupted=True, **options)
    steps = [line["step"] for line in metrics(tmp_path / "out") if "train_loss" in line]
    assert steps == [4, 9, 11]
    assert checkpoint(tmp_path / "out")["global_step"] == 12


@pytest.mark.parametrize("last_step", [5, 10])
def test_a_checkpoint_at_the_last_step_of_an_epoch_leads_into_the_next(
    last_step: int, tmp_path: Path, images: Path
) -> None:
    options: dict[str, Any] = {"batch_size": 2, "epochs": 3}
    train(tmp_path / "unbroken", images, **options)
    saving = {"model_checkpoint": {"every_n_train_steps": 5}}
    stopping_run(tmp_path / "broken", images, last_step + 1, saving)
    assert checkpoint(tmp_path / "broken")["global_step"] == last_step
    train(tmp_path / "broken", images, resume_interrupted=True, callbacks=saving, **options)
    assert_same(dict(exported(tmp_path / "broken")), dict(exported(tmp_path / "unbroken")))


def stopping_run(out: Path, images: Path, step: int, saving: dict[str, Any]) -> None:
    """A run that raises in the step after `step` steps."""

    class Stops(TinyWrapper):
        def forward_features(self, x: Tensor) -> dict[str, Any]:
            if self.training:
                self.calls = getattr(self, "calls", 0) + 1
                if self.calls == step:
                    raise KeyError("stop")
            return super().forward_features(x)

    with pytest.raises(KeyError, match="stop"):
        train(out, images, model=Stops(), batch_size=2, epochs=3, callbacks=saving)


def test_resuming_needs_the_same_method_and_data(tmp_path: Path, images: Path) -> None:
    train(tmp_path, images)
    with pytest.raises(ValueError, match=r"is of method='simclr', and method='byol' was given"):
        train(tmp_path, images, "byol", resume_interrupted=True)
    with pytest.raises(ValueError, match=r"2 batches in an epoch.*there are 5"):
        train(tmp_path, images, batch_size=2, resume_interrupted=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim_args": {"lr": 3.0}}, r"other arguments:\n  optim_args was .*'lr': 0.3.* and is .*'lr': 3.0"),
        ({"optim": "adamw", "seed": 3}, r"  seed was 0 and is 3\n  optim was 'sgd' and is 'adamw'"),
        ({"transform_args": {"image_size": 20}}, r"transform_args was "),
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps was 1 and is 2"),
        ({"method_args": {"temperature": 0.3}}, r"method_args was .* and is \{'temperature': 0.3\}"),
        ({"model": TinyWrapper(dim=11)}, r"is of another model.*of shape \(12,\) there and of shape \(11,\) here"),
    ],
)
def test_resuming_with_other_settings_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path, images: Path
) -> None:
    train(tmp_path, images)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        train(tmp_path, images, **{"epochs": 2, "resume_interrupted": True, **options})
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_resuming_more_epochs_goes_on(tmp_path: Path, images: Path) -> None:
    train(tmp_path, images, epochs=1)
    before = exported(tmp_path)
    train(tmp_path, images, epochs=2, resume_interrupted=True)
    assert checkpoint(tmp_path)["epoch"] == 1
    same = {name for name, value in exported(tmp_path).items() if torch.equal(before[name], value)}
    assert {"5.weight", "5.bias"} <= same, "what the loss does not reach"
    assert not {"0.weight", "4.weight"} & same
    assert "restoring" in (tmp_path / "train.log").read_text()


def test_resuming_nothing_starts_from_scratch(tmp_path: Path, images: Path) -> None:
    (tmp_path / "stray.txt").write_text("kept")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "train_loss": 3.0}\n')  # killed before its first checkpoint
    train(tmp_path, images, resume_interrupted=True)
    assert [step for step, _ in losses(tmp_path)] == [1]
    assert "starting from scratch" in (tmp_path / "train.log").read_text()


def test_out_that_is_not_empty_is_refused_and_overwritten_cleanly(tmp_path: Path, images: Path) -> None:
    train(tmp_path, images, epochs=2)
    (tmp_path / "stray.txt").write_text("kept")
    with pytest.raises(ValueError, match=r"is not empty! Set overwrite=True .* or resume_interrupted=True"):
        train(tmp_path, images)
    train(tmp_path, images, overwrite=True)
    assert {"stray.txt", "checkpoints/epoch=0-step=2.ckpt"} <= files(tmp_path)
    assert "checkpoints/epoch=1-step=4.ckpt" not in files(tmp_path)
    assert max(line["step"] for line in metrics(tmp_path)) == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a directory"):
        train(tmp_path / "file", images)


def hold(folder: Path, held: Any) -> None:
    with OutFolder(folder).opened(clear=False):
        FORK.Process(target=time.sleep, args=(30,)).start()  # a worker that outlives it
        held.set()
        time.sleep(60)


def test_two_runs_on_one_folder_are_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path, images: Path) -> None:
    held = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, held))
    process.start()
    assert held.wait(60)
    with pytest.raises(ValueError, match="another run is writing to"):
        train(tmp_path, images)
    assert not files(tmp_path)
    process.kill()
    process.join()
    train(tmp_path, images)
