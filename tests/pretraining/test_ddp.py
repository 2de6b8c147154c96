"""Two processes: the same as one on the joint batch."""

from pathlib import Path
from typing import Any

import torch

from tests.fresh import fresh
from tests.pretraining.tiny import TinyWrapper, checkpoint, exported, losses, train, write_images

METHODS = ("simclr", "moco", "byol", "barlowtwins", "vicreg", "dino", "densecl")


@fresh
def test_two_processes_train_as_one_on_the_joint_batch(tmp_path: Path) -> None:
    for method in METHODS:
        compare(method, tmp_path / method)


def compare(method: str, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 8)
    options: dict[str, Any] = {"precision": "64-true", "epochs": 2, "batch_size": 4}
    train(tmp_path / "one", images, method, **options)
    wrapper = TinyWrapper()
    train(tmp_path / "two", images, method, model=wrapper, strategy="ddp_fork", devices=2, **options)
    assert type(wrapper.model[1]) is torch.nn.BatchNorm2d
    one, two = exported(tmp_path / "one"), exported(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{method}, {name}: {text}"
        )
    assert checkpoint(tmp_path / "two")["global_step"] == 4
    assert [step for step, _ in losses(tmp_path / "two")] == [1, 3]
