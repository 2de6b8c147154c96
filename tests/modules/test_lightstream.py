"""What users of lightstream write, trained by Lightning, equals the plain model trained by plain PyTorch."""

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from widefield.modules import BaseModule, StreamingConstructor, StreamingModule
from widefield.streaming import StreamingCNN


def make_trunk() -> nn.Sequential:
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 8, 3, padding=1)
    )
    with torch.no_grad():
        trunk[1].running_mean.uniform_(-1, 1)  # type: ignore[union-attr, operator]
        trunk[1].running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return trunk.double()


def make_head() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)).double()


def make_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    sizes = ((70, 90), (64, 51), (83, 77), (60, 60))
    return [(torch.rand(3, h, w, generator=generator).double(), torch.tensor(k % 2)) for k, (h, w) in enumerate(sizes)]


class Inherits(StreamingModule):
    """The step of `BaseModule`, on every process's share of the batches: of two, the first has images 0 and 2."""

    def train_dataloader(self) -> Any:
        return DataLoader(make_batches()[self.trainer.global_rank :: self.trainer.world_size])  # type: ignore[arg-type]


class Plain(Inherits):
    """As the page has it: a forward of its own, and a backward that calls `backward_streaming`."""

    def forward(self, x: Any) -> Any:
        return self.forward_head(self.forward_streaming(x))

    def training_step(self, batch: Any, batch_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        image, target = batch
        self.image = image
        self.str_output = self.forward_streaming(image)
        assert self.str_output.is_leaf
        if self.use_streaming:
            self.str_output.requires_grad = self.training
        return self.loss_fn(self.forward_head(self.str_output), target)

    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        loss.backward()
        if self.train_streaming_layers and self.use_streaming:
            self.backward_streaming(self.image, self.str_output.grad)
        del self.str_output


class NoBackward(Inherits):
    """Cut in two, and nothing is overridden that brings the gradient to the trunk. A hook does not call super."""

    def on_train_epoch_start(self) -> None:
        pass

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, target = batch
        return self.loss_fn(self.forward_head(self.forward_streaming(image)), target)


class OneGraph(Inherits):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, target = batch
        return self.loss_fn(self.head(self.stream_network(image)), target)


def train(module: pl.LightningModule, **options: Any) -> None:
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(module)


def train_plainly(trains: bool, together: int = 1) -> tuple[nn.Module, nn.Module]:
    """The plain model after two epochs; `together` images per step, whose losses are averaged."""
    trunk, head = make_trunk().eval(), make_head()
    trunk.requires_grad_(trains)
    parameters = [p for p in (*trunk.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        batches = make_batches()
        for k in range(0, len(batches), together):
            optimizer.zero_grad()
            for image, target in batches[k : k + together]:
                (nn.functional.cross_entropy(head(trunk(image[None])), target[None]) / together).backward()
            optimizer.step()
    return trunk, head


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("kind", [Plain, NoBackward, OneGraph, Inherits])
def test_trains_as_plain_pytorch(kind: type[StreamingModule], trains: bool) -> None:
    module = kind(make_trunk(), make_head(), 32, nn.functional.cross_entropy, train_streaming_layers=trains, lr=1e-2)
    train(module)
    assert_trained(module, *train_plainly(trains))


@pytest.mark.parametrize("kind", [Plain, NoBackward, OneGraph])
def test_two_processes_train_as_one_on_both_images(
    kind: type[StreamingModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # the processes import this module
    module = kind(make_trunk(), make_head(), 32, nn.functional.cross_entropy, lr=1e-2)
    train(module, strategy="ddp_spawn", devices=2, default_root_dir=tmp_path)
    assert_trained(module, *train_plainly(True, together=2))


def assert_trained(module: StreamingModule, trunk: nn.Module, head: nn.Module) -> None:
    for (name, right), value in zip(
        trunk.state_dict().items(), module.stream_network.module.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    for right, value in zip(head.parameters(), module.head.parameters(), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-11)


def test_without_streaming_the_same_is_trained() -> None:
    module = Plain(make_trunk(), make_head(), 32, nn.functional.cross_entropy, lr=1e-2)
    module.disable_streaming_hooks()
    assert not module.use_streaming
    plain = NoLeaf(module)
    image, target = make_batches()[0][0][None], torch.tensor([0])
    plain.loss(image, target).backward()
    wanted = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    module.enable_streaming_hooks()
    loss = module.training_step((image, target), 0)
    module.backward(loss)
    for value, right in zip((p.grad for p in module.parameters()), wanted, strict=True):
        torch.testing.assert_close(value, right)


class LeavesTheTrunkOut(NoBackward):
    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        loss.backward()


def test_a_gradient_that_goes_no_further_is_said() -> None:
    with pytest.warns(UserWarning, match=r"nothing brought it to the trunk.*in LeavesTheTrunkOut\.backward call"):
        train(LeavesTheTrunkOut(make_trunk(), make_head(), 32, nn.functional.cross_entropy))


class NoLeaf:
    def __init__(self, module: StreamingModule) -> None:
        self.module = module

    def loss(self, image: Tensor, target: Tensor) -> Tensor:
        fmap = self.module.forward_streaming(image)
        assert fmap.grad_fn is not None
        return self.module.loss_fn(self.module.forward_head(fmap), target)


def test_backward_of_an_image_that_was_not_recorded() -> None:
    trunk = make_trunk().eval()
    network, image = StreamingCNN(copy.deepcopy(trunk), (1, 3, 32, 48)), make_batches()[0][0][None]
    assert network.tile_size == (32, 48)
    out = trunk(image)
    grad = torch.rand_like(out)
    out.backward(grad)
    network.backward(image, grad)
    module = BaseModule(copy.deepcopy(trunk), tile_size=32)
    module.backward_streaming(image, grad)
    for other in (network, module):
        for right, value in zip(trunk.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(value.grad, right.grad)
    with pytest.raises(ValueError, match=r"call loss\.backward"):
        module.backward_streaming(image, None)


def test_what_was_recorded_goes_with_the_map() -> None:
    module, image = BaseModule(make_trunk(), tile_size=32), make_batches()[0][0][None]
    for _ in range(3):
        fmap = module.forward_streaming(image)
        assert fmap.requires_grad
    assert sum(waiting() is not None for waiting in module._pending) == 1
    del fmap
    with torch.no_grad():
        assert not module.forward_streaming(image).requires_grad
    module.backward(module.forward_streaming(image).sum())
    assert not module._pending


def test_saliency_is_the_gradient_of_the_image() -> None:
    trunk, image = make_trunk().eval(), make_batches()[0][0][None]
    network = StreamingConstructor(copy.deepcopy(trunk), 32, saliency=True, mean=[0.5] * 3, std=[0.2] * 3)
    streamed = network.prepare_streaming_model()
    streamed(image).square().sum().backward()
    whole = image.clone().requires_grad_()
    trunk((whole - 0.5) / 0.2).square().sum().backward()
    torch.testing.assert_close(streamed.saliency_map, whole.grad)
    assert image.grad is None and not image.requires_grad


def test_deterministic_passes() -> None:
    network, image = StreamingCNN(make_trunk(), 32, deterministic=True), make_batches()[0][0][None]
    seen = set()
    network.progress = lambda phase, *_: seen.add((phase, torch.are_deterministic_algorithms_enabled()))
    network(image).sum().backward()
    assert seen == {("forward", True), ("backward", True)}
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_constructor_runs_callbacks_and_undoes_what_the_first_do_to_weights(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    trunk, calls = make_trunk(), []
    weights = copy.deepcopy(trunk.state_dict())

    def before(model: nn.Module) -> None:
        calls.append("before")
        for p in model.parameters():
            p.data.fill_(7.0)

    def after(model: nn.Module) -> None:
        torch.testing.assert_close(dict(model.state_dict()), dict(weights))
        calls.append("after")

    caplog.set_level("INFO")
    network = StreamingConstructor(
        trunk,
        64,
        verbose=True,
        statistics_on_cpu=True,
        add_keep_modules=[nn.BatchNorm2d],
        normalize_on_gpu=True,
        before_streaming_init_callbacks=[before, before],
        after_streaming_init_callbacks=[after],
    ).prepare_streaming_model()
    assert calls == ["before", "before", "after"]
    assert network.normalisation.mean == (0.485, 0.456, 0.406)
    assert "max_pool2d" in capsys.readouterr().out
    for name in ("statistics_on_cpu", "add_keep_modules"):
        assert f"{name} has no effect" in caplog.text


def test_images_stay_where_they_are_unless_wanted() -> None:
    meta, (image, target) = torch.device("meta"), make_batches()[0]
    batch = image[None], target[None]
    for copied in (False, True):
        module = BaseModule(make_trunk(), tile_size=32, copy_to_gpu=copied)
        moved = module.transfer_batch_to_device(batch, meta, 0)
        assert [part.device.type for part in moved] == ["meta" if copied else "cpu", "meta"]
        moved = module.transfer_batch_to_device((image[None], image[None]), meta, 0)
        assert moved[1].device.type == "meta", "a target as large as an image is no image"


def test_names_that_lightstream_users_know() -> None:
    module = BaseModule(make_trunk(), make_head(), 64, tile_cache_dir=".", tile_cache_fname="cache")
    module.tile_size = 32
    np.testing.assert_array_equal(module.configure_tile_stride(), [32, 32])
    module.tile_size = (32, None)
    with pytest.raises(ValueError, match="plan"):
        module.configure_tile_stride()
    extra = nn.Parameter(torch.zeros(1))
    module.extend_trainable_params([extra, extra])
    assert sum(p is extra for p in module.get_trainable_params()) == 1
    module.train()
    module.on_train_start()
    module.on_train_epoch_start()
    assert not module.stream_network.module[1].training
    assert module.stream_network.module[0].training
    module.save_tile_cache_if_needed(overwrite=True)
    module.load_tile_cache_if_needed(use_tile_cache=False)
