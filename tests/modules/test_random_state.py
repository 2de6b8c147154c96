"""A resumed run draws what an unbroken one draws."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from widefield.modules import AtomicCheckpointIO, RandomState, StreamingModule


def train(epochs: int, folder: Path, resume_from: Path | None = None) -> StreamingModule:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(0.5))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2))
    module = StreamingModule(trunk, head, 16, nn.CrossEntropyLoss())
    images, targets = torch.rand(4, 3, 20, 20), torch.tensor([0, 1, 0, 1])
    loader = DataLoader(TensorDataset(images, targets), batch_size=2, generator=torch.Generator())
    callbacks = [RandomState(), ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=resume_from, weights_only=True)
    return module


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    unbroken = train(3, tmp_path / "unbroken").state_dict()
    train(1, tmp_path / "broken")
    resumed = train(3, tmp_path / "broken", tmp_path / "broken" / "epoch=0.ckpt").state_dict()
    assert all(torch.equal(resumed[key], value) for key, value in unbroken.items())


def test_a_checkpoint_replaces_the_old_one_whole(tmp_path: Path) -> None:
    plugin, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    plugin.save_checkpoint({"step": 1}, path)

    class Unsaveable:
        def __reduce__(self) -> tuple:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        plugin.save_checkpoint({"step": 2, "bad": Unsaveable()}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
