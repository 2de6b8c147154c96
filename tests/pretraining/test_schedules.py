"""Runs go through all of their schedules with every method and every optimizer, whatever trains when."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.pretraining.tiny import TinyWrapper, checkpoint, losses, train
from widefield.pretraining import METHODS
from widefield.pretraining.optimizers import SGD, begin_momentum, can_fuse

STEPS = 10
"""In the first, learning rates warm up and last layers of heads wait; in 3 of them temperatures of teachers rise."""

RUNS = [(method, optim.name) for method in METHODS.index for optim in METHODS.get(method).optim.choices]


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return list(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def run(out: Path, images: list[Tensor], method: str = "dino", **options: Any) -> None:
    """`STEPS` steps, two to an epoch, without what no test here looks at."""
    off: dict[str, Any] = dict.fromkeys(("quality", "learning_rate_monitor", "model_checkpoint", "model_export"))
    options["callbacks"] = {**off, **options.get("callbacks", {})}
    options = {"epochs": STEPS // 2, "batch_size": 2, "loggers": {"tensorboard": None}, **options}
    train(out, images, method, **{"trainer_args": {"log_every_n_steps": 1}, **options})


@pytest.mark.parametrize(("method", "optim"), RUNS)
def test_every_method_and_optimizer_goes_through_its_schedules(
    method: str, optim: str, tmp_path: Path, images: list[Tensor]
) -> None:
    run(tmp_path, images, method, optim=optim)
    assert [step for step, loss in losses(tmp_path) if math.isfinite(loss)] == list(range(STEPS))


class Thaws(TinyWrapper):
    """Its first convolution is frozen in some forward passes of the training; it remembers its weights of each."""

    def __init__(self, frozen: range) -> None:
        super().__init__()
        self.frozen, self.seen = frozen, list[Tensor]()
        self.model[0].requires_grad_(0 not in frozen)

    def forward_features(self, x: Tensor) -> dict[str, Any]:
        if self.training and torch.is_grad_enabled():
            self.model[0].requires_grad_(len(self.seen) not in self.frozen)
            self.seen.append(self.model[0].weight.detach().clone())
        return super().forward_features(x)


@pytest.mark.parametrize("optim", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize("frozen", [range(3), range(2, 5)])
def test_what_is_frozen_for_some_steps_trains_in_the_others(
    frozen: range, optim: str, tmp_path: Path, images: list[Tensor]
) -> None:
    model = Thaws(frozen)
    run(tmp_path, images, "simclr", model=model, optim=optim, trainer_args={"max_steps": 7})
    still = [torch.equal(one, other) for one, other in zip(model.seen, model.seen[1:])]
    assert still == [step in frozen for step in range(6)]


def test_a_part_without_a_gradient_in_an_accumulated_batch_trains_in_the_step(
    tmp_path: Path, images: list[Tensor]
) -> None:
    model = Thaws(range(0, 3))  # both batches of the first step, and one of the second
    run(tmp_path, images, "simclr", model=model, gradient_accumulation_steps=2)
    still = [torch.equal(one, other) for one, other in zip(model.seen, model.seen[1:])]
    assert still == [True] * 3 + [batch % 2 == 0 for batch in range(3, 9)]


def test_a_run_goes_on_with_a_checkpoint_of_steps_in_which_the_last_layer_waited(
    tmp_path: Path, images: list[Tensor]
) -> None:
    def stops(self: Any, step: int) -> None:
        if step == 1:
            raise KeyError("stop")

    saving = {"model_checkpoint": {"every_n_train_steps": 1}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS.get("dino"), "before_step", stops)
        with pytest.raises(KeyError, match="stop"):
            run(tmp_path, images, callbacks=saving)
    (state,) = checkpoint(tmp_path)["optimizer_states"]
    assert len(state["state"]) < sum(len(group["params"]) for group in state["param_groups"]), "none for what waited"
    run(tmp_path, images, callbacks=saving, resume_interrupted=True)
    assert checkpoint(tmp_path)["global_step"] == STEPS


def test_a_warm_up_above_the_temperature_of_the_teacher_is_none(tmp_path: Path, images: list[Tensor]) -> None:
    options = {"hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 32, "teacher_temp": 0.03}
    run(tmp_path, images, method_args={**options, "warmup_teacher_temp": 0.05}, trainer_args={"max_steps": 1})
    assert len(losses(tmp_path)) == 1


def test_fused_sgd_equals_the_other_whichever_gradients_come_first() -> None:
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(3)) for _ in range(3)]
        optimizer = SGD().make([{"params": weights}], 0.1, fused)
        for step in range(4):
            optimizer.zero_grad()
            sum((weight.sin() * weight).sum() for weight in weights[: step + 1]).backward()
            begin_momentum(optimizer)
            optimizer.step()
        results.append(torch.stack([weight.detach() for weight in weights]))
    torch.testing.assert_close(results[0], results[1])


def test_weights_with_gaps_in_memory_are_not_updated_in_one_pass() -> None:
    gaps, dense = nn.Parameter(torch.ones(4, 8)[:, ::2]), nn.Parameter(torch.ones(4, 8).t())
    assert can_fuse([dense]) and not can_fuse([dense, gaps])
