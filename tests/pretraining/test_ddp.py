"""Two processes: the same as one on the joint batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.fresh import fresh
from tests.pretraining.tiny import QUIET, checkpoint, exported, losses, model_for, train, write_images
from widefield.pretraining import METHODS
from widefield.pretraining.methods import dinov2, distillation, mae, transformers


@fresh
def test_two_processes_train_as_one_on_the_joint_batch(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 8)
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        for method in METHODS.index:
            compare(method, tmp_path / method, images)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Hide the same patches of every image, and mix none: each process draws for its images, and one draws for all."""

    def hidden(count: int, grid: tuple[int, int]) -> Tensor:
        return (torch.arange(grid[0] * grid[1]) % 4 > 0).view(1, *grid).expand(count, -1, -1)

    def leave_out(tokens: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        return tokens[:, :kept], (places >= kept).to(tokens), places

    patch.setattr(transformers.MaskedMethod, "masks", lambda _, images, grid: hidden(len(images), grid))
    patch.setattr(dinov2, "random_masks", lambda count, grid, *_: hidden(count, grid))
    patch.setattr(mae, "leave_out", leave_out)
    patch.setattr(distillation, "_mixed", lambda images: images)


def compare(method: str, tmp_path: Path, images: Path) -> None:
    options: dict[str, Any] = {**QUIET, "precision": "64-true", "epochs": 2, "batch_size": 4}
    train(tmp_path / "one", images, method, **options)
    wrapper: Any = model_for(method)
    kinds = [type(module) for module in wrapper.modules()]
    train(tmp_path / "two", images, method, model=wrapper, strategy="ddp_fork", devices=2, **options)
    assert [type(module) for module in wrapper.modules()] == kinds
    one, two = exported(tmp_path / "one"), exported(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{method}, {name}: {text}"
        )
    assert checkpoint(tmp_path / "two")["global_step"] == 4
    assert [step for step, _ in losses(tmp_path / "two")] == [1, 3]
