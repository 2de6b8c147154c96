"""Training in which several processes share each image: that of one process, or of as many as there are groups."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAUROC

import widefield
from tests.fresh import fresh
from tests.small_images import write_folder
from widefield.cli import main
from widefield.data import EpochShuffle
from widefield.modules import ImageNetClassifier, SplitImages

EPOCHS = 2
TOLERANCE = 1e-11
"""Relative, of numbers of 64 bits that differ by the order in which they are summed, through 8 steps of AdamW."""


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images of several sizes, with noise that is drawn anew for each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 50 + 9 * (index % 3), 40, dtype=torch.float64, generator=generator)
        return image + torch.randn_like(image), index % 2


class Network(ImageNetClassifier):
    """A small network with random masks in the trunk and in the head."""

    def __init__(self) -> None:
        trunk = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(6, 8, 3), nn.ReLU())
        head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 2))
        metrics = {"auc": MulticlassAUROC(2)}
        super().__init__(trunk, head, (16, 24), nn.CrossEntropyLoss(), metrics=metrics, value_range=(0, 1), lr=0.01)
        self.images = SumMetric()

    def train_dataloader(self) -> Any:
        data = Images()
        return DataLoader(data, sampler=EpochShuffle.of(len(data), 3, self.trainer))

    def val_dataloader(self) -> Any:
        return DataLoader(Images())

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.images.update(len(batch[1]))
        self.log("images", self.images)
        return super().validation_step(batch, batch_idx)


class Numbers(Callback):
    """Keeps the logged numbers of each epoch, and how many processes share an image."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.sharing = 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        ranks = pl_module.stream_network.ranks
        self.sharing = 1 if ranks is None else ranks.size

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def train(file: Path, strategy: Any = "auto", processes: int = 1) -> None:
    """Train the network, and write its weights and numbers to `file`."""
    seed_everything(5, verbose=False)
    model, numbers = Network(), Numbers()
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(
        strategy=strategy, devices=processes, accelerator="cpu", precision="64-true", max_epochs=EPOCHS,
        num_sanity_val_steps=0, callbacks=[numbers], **quiet,
    )  # fmt: skip
    trainer.fit(model)
    if trainer.is_global_zero:
        assert isinstance(model.stream_network(torch.zeros(1, 3, 40, 40, dtype=torch.float64)), Tensor)  # alone
        torch.save({"weights": model.state_dict(), "numbers": numbers.epochs, "sharing": numbers.sharing}, file)


def train_as(rank: int, processes: int, port: int, file: Path, strategy: Any, work: Any) -> None:
    """Train as one of the processes that torchrun starts."""
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
    }
    torch.set_num_threads(1)  # renews torch's pool of threads after the fork
    work(file, strategy, processes)


def train_in(processes: int, file: Path, strategy: Any, work: Any = train) -> None:
    """Train in several processes: each calls `work` as `train`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=train_as, args=(k, processes, port, file, strategy, work)) for k in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * processes


def assert_same(found: Path, expected: Path) -> None:
    one, other = torch.load(found), torch.load(expected)
    assert (one["sharing"], other["sharing"]) == (2, 1)
    for name, value in other["weights"].items():
        assert (one["weights"][name] - value).abs().max() <= TOLERANCE * value.abs().max(), name
    assert len(one["numbers"]) == EPOCHS
    assert {"train_loss", "val_loss", "val_auc", "images"} < set(one["numbers"][0])
    for numbers, right in zip(one["numbers"], other["numbers"], strict=True):
        assert numbers == pytest.approx(right, rel=1e-6)  # Lightning logs 32 bits
        assert numbers["images"] == len(Images())


@fresh
def test_processes_that_share_each_image_train_as_one(tmp_path: Path) -> None:
    train_in(2, tmp_path / "shared", SplitImages())
    train(tmp_path / "alone")
    assert_same(tmp_path / "shared", tmp_path / "alone")


@pytest.mark.slow
@fresh
def test_two_groups_of_processes_train_as_two_processes(tmp_path: Path) -> None:
    train_in(4, tmp_path / "groups", SplitImages(2))
    train_in(2, tmp_path / "replicas", DDPStrategy())
    assert_same(tmp_path / "groups", tmp_path / "replicas")


@pytest.mark.parametrize(
    ("processes", "sharing", "message"),
    [
        (1, None, r"there is one: start them with `torchrun --nproc-per-node 4"),
        (6, 4, r"6 processes cannot be divided into groups of 4 that share an image; let 1, 2, 3, 6 share one"),
    ],
)
def test_processes_that_cannot_share_images_are_refused(processes: int, sharing: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(strategy=SplitImages(sharing), devices=processes, accelerator="cpu", logger=False)
    with pytest.raises(ValueError, match="processes=0 must be at least 1"):
        SplitImages(0)


def test_replicas_take_together_what_one_process_takes() -> None:
    order = list(EpochShuffle(7, seed=3))
    parts = [list(EpochShuffle(7, 3, num_replicas=2, rank=rank)) for rank in range(2)]
    assert parts == [[*order[::2]], [*order[1::2], order[0]]]
    assert [len(EpochShuffle(7, 3, 2, rank)) for rank in range(2)] == [4, 4]


def test_fit_takes_the_processes_of_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("widefield.cli.fit_run.train", lambda config, left, resume: seen.append(config.data["trainer"]))
    write_folder(tmp_path, 2, 64)
    places = [tmp_path / "out", tmp_path / "images", tmp_path / "labels.csv"]
    widefield.fit(*places)
    environment = {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "RANK": "0",
        "LOCAL_RANK": "0",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    widefield.fit(*places)
    widefield.fit(*places, split_images=2)
    flags = [f"--{name}={place}" for name, place in zip(("out", "images", "labels"), places, strict=True)]
    for given in (["--split-images=2"], ["--split-images"]):
        assert main(["fit", *flags, "--model=resnet18", *given]) == 0
    assert not {"strategy", "devices", "num_nodes"} & seen[0].keys()
    assert all((one["devices"], one["num_nodes"]) == (4, 2) for one in seen[1:])
    strategies = [one.get("strategy") for one in seen[1:]]
    two, every = ({"type": "widefield.modules.SplitImages", "processes": count} for count in (2, None))
    assert strategies == [None, two, two, every]


def command(folder: Path, out: str, *more: str) -> list[str]:
    files = ["--images", f"{folder}/images", "--labels", f"{folder}/labels.csv", "--out", f"{folder / out}"]
    options = [
        "--model",
        "resnet10_w16",
        "--tile-size",
        "64",
        "--epochs",
        "3",
        "trainer.precision=64-true",
        "--split-images",
    ]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "widefield", "fit"]
    return [sys.executable, *start, *files, *options, *more]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_the_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    write_folder(tmp_path, 6, 500)
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(tmp_path, "whole"), check=True, **quiet)
    torchrun = subprocess.Popen(command(tmp_path, "killed"), **quiet)
    while not (tmp_path / "killed" / "last.ckpt").is_file():
        assert torchrun.poll() is None
        time.sleep(0.1)
    processes = [int(pid) for pid in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()]
    assert len(processes) == 2
    os.kill(processes[1], signal.SIGKILL)
    assert torchrun.wait(timeout=60) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)
    subprocess.run(command(tmp_path, "killed", "--resume"), check=True, **quiet)
    one, other = (torch.load(tmp_path / out / "last.ckpt", weights_only=True) for out in ("killed", "whole"))
    assert one["global_step"] == other["global_step"]
    assert all(torch.equal(one["state_dict"][name], value) for name, value in other["state_dict"].items())
    assert one["callbacks"]["History"] == other["callbacks"]["History"]
