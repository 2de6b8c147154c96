"""Numbers that are NaN or infinite end a training, and none of them is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from widefield.modules import AtomicCheckpointIO, FiniteTraining, NotFiniteError

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


class Line(pl.LightningModule):
    """A linear layer; 3 steps an epoch. `spoil(module, step)` may change the weights' gradients; `loss_at` the loss."""

    def __init__(
        self, spoil: Callable[["Line", int], None] | None = None, losses: dict[int, float] | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.spoil, self.losses = spoil, losses or {}
        self.measures = [1.0]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        return loss * self.losses.get(self.global_step + 1, 1.0)

    def on_after_backward(self) -> None:
        if self.spoil is not None:
            self.spoil(self, self.global_step + 1)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("measure", self.measures[self.current_epoch % len(self.measures)])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(module: Line, folder: Path, *callbacks: pl.Callback, epochs: int = 2, resume: Path | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=[FiniteTraining(), *callbacks], plugins=[AtomicCheckpointIO()],
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    batches = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader, ckpt_path=resume, weights_only=True)
    return trainer


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def infinite_gradient_in(step: int) -> Callable[[Line, int], None]:
    def spoil(module: Line, now: int) -> None:
        if now == step:
            module.layer.weight.grad.fill_(torch.inf)  # type: ignore[union-attr]

    return spoil


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Line(losses={5: torch.nan}), r"the loss of step 5 \(epoch 2\) is NaN or infinite.*smaller learning rate"),
        (Line(losses={4: -torch.inf}), r"the loss of step 4 \(epoch 2\)"),
        (Line(infinite_gradient_in(4)), r"the loss of step 5 \(epoch 2\)"),
        (Line(infinite_gradient_in(6)), r"after step 6, layer.weight \(epoch 2\)"),
    ],
)
def test_the_last_finite_epoch_is_kept_and_goes_on(module: Line, message: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_last=True, save_on_train_epoch_end=True)
    with pytest.raises(NotFiniteError, match=message):
        fit(module, tmp_path, keep, epochs=3)
    assert {path.name for path in tmp_path.iterdir()} == {"epoch=0.ckpt", "last.ckpt"}
    last = saved(tmp_path / "last.ckpt")
    assert last["global_step"] == 3
    assert last["state_dict"]["layer.weight"].isfinite().all()
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_last=True, save_on_train_epoch_end=True)
    assert fit(Line(), tmp_path, keep, epochs=3, resume=tmp_path / "last.ckpt").global_step == 9


def test_no_checkpoint_is_written_within_an_epoch_of_weights_or_optimizers_that_are_not_finite(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(NotFiniteError, match=r"after step 2, layer.weight"):
        fit(Line(infinite_gradient_in(2)), tmp_path, keep)
    assert [path.name for path in tmp_path.iterdir()] == ["step=1.ckpt"]

    def huge(module: Line, step: int) -> None:
        module.layer.weight.grad.fill_(1e30)  # type: ignore[union-attr] # its square is infinite, the weight is not

    with pytest.raises(NotFiniteError, match=r"after step 1, optimizer 0.0.exp_avg_sq"):
        fit(Line(huge), tmp_path / "huge", ModelCheckpoint(tmp_path / "huge", every_n_train_steps=1))


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_measure_that_is_not_finite_is_never_the_best(mode: Any, tmp_path: Path) -> None:
    module = Line()
    module.measures = [torch.nan, 2.0, torch.inf if mode == "max" else -torch.inf]
    keep = ModelCheckpoint(tmp_path, "{epoch}", "measure", mode=mode, save_last=True, save_on_train_epoch_end=True)
    fit(module, tmp_path, keep, epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    fit(module, tmp_path, keep, epochs=3)
    assert Path(keep.best_model_path).name == "epoch=1.ckpt"


def test_losses_of_accumulated_gradients_name_the_step_that_they_belong_to(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[FiniteTraining()], accumulate_grad_batches=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(NotFiniteError, match="the loss of step 2 ") as caught:
        trainer.fit(Line(losses={2: torch.nan}), DataLoader(torch.rand(4, 4, 2), batch_size=None))  # type: ignore[arg-type]
    assert caught.value.step == 2
