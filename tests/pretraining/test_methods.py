"""What methods make of the size of the data, and how they are optimised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.pretraining.tiny import TinyWrapper, small, train, write_images
from widefield.components.models.contrastive_models import follow, rising
from widefield.pretraining import METHODS, EmbeddingModel, Run
from widefield.pretraining.methods.base import Queue, queue_length
from widefield.pretraining.optimizers import parameter_groups, warmup_and_cosine


def make(name: str, dataset_size: int = 100, steps: int = 100, **options: Any) -> Any:
    return METHODS.get(name)(
        EmbeddingModel(TinyWrapper()), Run(12, dataset_size, 4, steps), **{**small(name), **options}
    )


def test_dino_depends_on_the_number_of_images() -> None:
    sizes = (10, 19_999, 20_000, 141_421, 1_000_000, 10_000_000)
    methods = [make("dino", size, output_dim="auto", steps=1_000_000) for size in sizes[:3]]
    assert [method.criterion.center.shape[-1] for method in methods] == [1024, 1024, 2048]
    values = [make("dino", size, steps=1_000_000) for size in sizes]
    assert [round(method.teacher_temp, 4) for method in values] == [0.02, 0.02, 0.02, 0.045, 0.07, 0.07]
    assert [round(method.momentum, 4) for method in values] == [0.99, 0.99, 0.99, 0.993, 0.996, 0.996]
    assert values[0].temp_steps == 37_500 and values[0].head.freeze_last_layer == 1_250
    short = make("dino", steps=100)
    assert short.temp_steps == 30 and short.head.freeze_last_layer == 10, "a short run trains its last layer, too"


def test_the_last_layer_of_dino_waits() -> None:
    method = make("dino", steps=100)
    views = [torch.rand(4, 3, 16, 16) for _ in range(2)]
    for step, trains in ((9, False), (10, True)):
        method.zero_grad()
        method.loss(views, step)["loss"].backward()
        method.after_backward(step)
        assert (method.head.last_layer.weight.grad is not None) == trains


def test_a_moving_copy_follows_and_a_momentum_rises() -> None:
    module, copy = nn.Linear(2, 2), nn.Linear(2, 2)
    wanted = 0.9 * copy.weight.detach() + 0.1 * module.weight.detach()
    follow([(module, copy)], 0.9)
    torch.testing.assert_close(copy.weight.detach(), wanted)
    assert [rising(step, 100, 0.9) for step in (0, 50, 100, 200)] == pytest.approx([0.9, 0.95, 1.0, 1.0])


def test_a_queue_is_smaller_than_the_data() -> None:
    assert [queue_length("auto", size, 8192) for size in (2, 10, 1000, 10**6)] == [1, 4, 256, 8192]
    with pytest.raises(ValueError, match="queue_size=100 must be above 0 and below the number of images, 100"):
        make("moco", 100, queue_size=100)


def test_a_queue_goes_on_at_its_beginning_where_it_ends() -> None:
    queue = Queue(3, 2)
    for keys in (torch.full((2, 2), 1.0), torch.full((2, 2), 2.0)):
        queue(keys, update=True)
    assert queue.bank[:, 0].tolist() == [2, 1, 2] and queue.bank_ptr.tolist() == [1]
    queue(torch.arange(5.0)[:, None].expand(5, 2), update=True)
    assert queue.bank[:, 0].tolist() == [2, 3, 4] and queue.bank_ptr.tolist() == [0]


@pytest.mark.parametrize("name", ["moco", "densecl", "distillation"])
def test_queues_are_in_the_state_dict(name: str) -> None:
    assert sum(key.endswith((".bank", "queue.bank")) for key in make(name).state_dict()) == (
        2 if name == "densecl" else 1
    )


def test_norms_biases_and_tokens_do_not_decay() -> None:
    module = nn.Module()
    module.conv, module.norm, module.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)
    module.cls_token, module.pos_embed = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 9, 8))
    module.layer_scale, module.frozen = nn.Parameter(torch.zeros(4, 1, 1)), nn.Linear(3, 3).requires_grad_(False)
    decays, others = parameter_groups(module, 0.1)
    names = {id(p): name for name, p in module.named_parameters()}
    assert [names[id(p)] for p in decays["params"]] == ["conv.weight", "linear.weight"]
    assert (decays["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(decays["params"]) + len(others["params"]) == len(names) - 2


def test_the_learning_rate_warms_up_and_falls_to_a_thousandth() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = warmup_and_cosine(optimizer, 10, 100), []
    for _ in range(120):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert rates[10:100] == sorted(rates[10:100], reverse=True)
    assert rates[99] == rates[119] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("name", "optimizer", "lr"),
    [("simclr", "sgd", 0.3), ("dino", "sgd", 0.03), ("distillation", "adamw", 5e-4), ("byol", "lars", 0.45)],
)
def test_the_default_optimizer_is_that_of_the_method(name: str, optimizer: str, lr: float) -> None:
    optim = METHODS.get(name).optim
    assert optim.named("auto").name == optimizer and optim.named("auto").lr == lr
    scaled = optim.scaled(lr, 4 * optim.reference_batch_size)
    assert scaled == pytest.approx(lr * (2 if name == "distillation" else 4))
    assert optim.named("adam") is None


def test_loggers_that_are_not_installed_say_so(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 4)
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"loggers\.wandb needs the package wandb, which is not installed"):
            train(tmp_path / "out", images, loggers={"wandb": {}})
        assert not (tmp_path / "out").exists()
    train(tmp_path / "none", images, loggers={"jsonl": None, "tensorboard": None})
    assert not (tmp_path / "none" / "metrics.jsonl").exists()


def test_callbacks_are_turned_off_by_none(tmp_path: Path) -> None:
    off = dict.fromkeys(("model_checkpoint", "model_export", "early_stopping", "learning_rate_monitor"))
    train(tmp_path / "out", write_images(tmp_path / "images", 4), callbacks=off)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.yaml", "metrics.jsonl", "train.log"}
