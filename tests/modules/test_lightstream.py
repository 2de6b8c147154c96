"""What users of lightstream write, trained by Lightning, equals the plain model trained by plain PyTorch."""

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import pytest
import pyvips
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

import widefield.transforms as A
from tests.fresh import fresh
from widefield.models.resnet import StreamingResNet
from widefield.modules import (
    BaseModule,
    ImageNetClassifier,
    LightningStreamingModule,
    StreamingConstructor,
    StreamingModule,
)
from widefield.modules.constructor import without_effect
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

    def on_fit_start(self) -> None:
        # renews torch's pool of threads after a fork, before threads of autograd could do so at once
        torch.set_num_threads(torch.get_num_threads())

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


class TwoMaps(Inherits):
    """Two maps in a step, of the image and of its mirror image."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        image, target = batch
        return self.loss_fn(self.both(image), torch.cat([target, target]))

    def both(self, image: Tensor) -> Tensor:
        self.images = [image, image.flip(3)]
        self.maps = self.forward_streaming(self.images)
        return torch.cat([self.forward_head(fmap) for fmap in self.maps])


class TwoMapsPlain(TwoMaps):
    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        loss.backward()
        for image, fmap in zip(self.images, self.maps, strict=True):
            self.backward_streaming(image, fmap.grad)


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


def train_plainly(trains: bool, together: int = 1, mirrored: bool = False) -> tuple[nn.Module, nn.Module]:
    """The plain model after two epochs; `together` images per step, whose losses are averaged; with their mirror images."""
    trunk, head = make_trunk().eval(), make_head()
    trunk.requires_grad_(trains)
    parameters = [p for p in (*trunk.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        batches = make_batches()
        for k in range(0, len(batches), together):
            optimizer.zero_grad()
            for image, target in batches[k : k + together]:
                images = torch.stack([image, image.flip(2)] if mirrored else [image])
                loss = nn.functional.cross_entropy(head(trunk(images)), target.expand(len(images)))
                (loss / together).backward()
            optimizer.step()
    return trunk, head


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("kind", [Plain, NoBackward, OneGraph, Inherits])
def test_trains_as_plain_pytorch(kind: type[StreamingModule], trains: bool) -> None:
    module = kind(make_trunk(), make_head(), 32, nn.functional.cross_entropy, train_streaming_layers=trains, lr=1e-2)
    train(module)
    assert_trained(module, *train_plainly(trains))


@pytest.mark.parametrize("kind", [TwoMaps, TwoMapsPlain])
def test_two_maps_in_a_step(kind: type[StreamingModule]) -> None:
    module = kind(make_trunk(), make_head(), 32, nn.functional.cross_entropy, lr=1e-2)
    train(module)
    assert_trained(module, *train_plainly(True, mirrored=True))


@fresh
def test_two_processes_train_as_one_on_both_images(tmp_path: Path) -> None:
    for kind in (Plain, NoBackward, OneGraph, TwoMaps, TwoMapsPlain):
        module = kind(make_trunk(), make_head(), 32, nn.functional.cross_entropy, lr=1e-2)
        train(module, strategy="ddp_fork", devices=2, default_root_dir=tmp_path)
        assert_trained(module, *train_plainly(True, together=2, mirrored=isinstance(module, TwoMaps)))


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
    with pytest.warns(UserWarning, match="nothing brought it to the trunk"):
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
    assert len(module._recordings._alive()) == 1
    del fmap
    with torch.no_grad():
        assert not module.forward_streaming(image).requires_grad
    module.backward(module.forward_streaming(image).sum())
    assert not module._recordings._alive()


def gradients(module: BaseModule) -> list[Tensor]:
    found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    module.zero_grad()
    return found


def one_image() -> tuple[StreamingModule, Tensor, Tensor]:
    module = StreamingModule(make_trunk(), make_head(), 32, nn.functional.cross_entropy)
    return module, make_batches()[0][0][None], torch.tensor([1])


def test_a_gradient_that_was_brought_is_not_brought_again() -> None:
    module, image, target = one_image()
    module.loss_fn(module(image), target).backward()
    wanted = gradients(module)
    fmap = module.forward_streaming(image)
    module.backward(module.loss_fn(module.forward_head(fmap), target))
    module.backward_streaming(image, fmap.grad)
    torch.testing.assert_close(gradients(module), wanted)


def test_two_losses_of_one_map() -> None:
    module, image, target = one_image()
    output = module(image)
    (module.loss_fn(output, target) + output.square().sum()).backward()
    wanted = gradients(module)
    output = module.forward_head(module.forward_streaming(image))
    module.backward(module.loss_fn(output, target), retain_graph=True)
    module.backward(output.square().sum())
    torch.testing.assert_close(gradients(module), wanted)
    fmap = module.forward_streaming(image)
    module.backward(fmap.sum())
    with pytest.raises(RuntimeError, match="retain_graph=True on all but the last"):
        module.backward(fmap.square().sum())


def test_maps_of_one_image_get_their_own_gradients() -> None:
    torch.manual_seed(0)
    module = BaseModule(nn.Sequential(*make_trunk(), nn.Dropout(0.5)), tile_size=32)
    image = make_batches()[0][0][None]
    found = []
    for by_hand in (False, True):
        torch.manual_seed(1)
        first, second = module.forward_streaming(image), module.forward_streaming(image)
        loss = first.square().sum() + 3 * second.sum()
        if by_hand:
            loss.backward()
            module.backward_streaming(image, second.grad)
            module.backward_streaming(image, first.grad)
        else:
            module.backward(loss)
        found.append(gradients(module))
    torch.testing.assert_close(*found)


def test_copies_have_recorded_nothing() -> None:
    module, image, _ = one_image()
    fmap = module.forward_streaming(image)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.backward(fmap.sum(), retain_graph=True)
        assert all(p.grad is None for p in (*other.parameters(), *module.parameters()))
        fmap.grad = None


def test_the_trunk_follows_when_it_is_frozen_later() -> None:
    module, image, target = one_image()
    for trains in (False, True):
        module.train_streaming_layers = trains
        assert module.train_streaming_layers is trains
        module.backward(module.loss_fn(module.forward_head(module.forward_streaming(image)), target))
        assert (module.stream_network.module[0].weight.grad is not None) is trains  # type: ignore[index, union-attr]
    module.stream_network.requires_grad_(False)
    fmap = module.forward_streaming(image)
    fmap.requires_grad = True
    module.loss_fn(module.forward_head(fmap), target).backward()
    module.backward_streaming(image, fmap.grad)


def test_a_frozen_trunk_still_gives_saliency() -> None:
    module = StreamingModule(make_trunk(), make_head(), 32, None, train_streaming_layers=False, saliency=True)
    image = make_batches()[0][0][None]
    module.backward(module.forward_head(module.forward_streaming(image)).sum())
    whole = image.clone().requires_grad_()
    module.head(make_trunk().eval()(whole)).sum().backward()
    torch.testing.assert_close(module.stream_network.saliency_map, whole.grad)


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
    without_effect.cache_clear()  # said once in a process, perhaps by an earlier test
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


class Named(NamedTuple):
    image: Tensor
    label: Tensor


def test_batches_of_any_shape_leave_the_images_alone() -> None:
    module, meta = BaseModule(make_trunk(), tile_size=32), torch.device("meta")
    image, mask, label = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1)
    batches: list[tuple[Any, list[str]]] = [
        (image, ["cpu"]),
        ({"image": image, "label": label}, ["cpu", "meta"]),
        (Named(image, label), ["cpu", "meta"]),
        ([[image, image], label], ["cpu", "cpu", "meta"]),
        ((image, mask, label), ["cpu", "meta", "meta"]),
        (([image, image], [mask, mask]), ["cpu", "cpu", "meta", "meta"]),
        ((image, {"mask": mask, "label": label}, ["a name"]), ["cpu", "meta", "meta"]),
    ]
    for batch, wanted in batches:
        moved = module.transfer_batch_to_device(batch, meta, 0)
        assert type(moved) is type(batch)
        assert [part.device.type for part in tree_leaves(moved) if isinstance(part, Tensor)] == wanted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": 64}, "head=64 is not a module"),
        ({"loss_fn": nn.CrossEntropyLoss}, "cannot be called with"),
        ({"loss_fn": "ce"}, "cannot be called with"),
        ({"foo": 1}, "there is no argument 'foo'"),
        ({"memory_buget": 1}, "did you mean memory_budget"),
        ({"los_fnn": 1}, "did you mean loss_fn"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0 must be at least 1"),
        (
            {"head": BaseModule(nn.Conv2d(3, 4, 3), tile_size=32)},
            "head is a BaseModule, which streams; the trunk comes first",
        ),
        ({"before_streaming_init_callbacks": print}, "must be a list of functions"),
    ],
)
def test_arguments_are_checked_when_they_are_given(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        BaseModule(make_trunk(), **{"tile_size": 32, **arguments})


def test_a_table_that_cannot_be_made_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    BaseModule(nn.Sequential(nn.Conv2d(3, 4, 7), nn.Conv2d(4, 4, 7)), tile_size=8, verbose=True)
    assert "no table of layers" in capsys.readouterr().out


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.first(x)
        return [x, self.second(x)]


class Sums(nn.Module):
    def forward(self, maps: list[Tensor]) -> Tensor:
        return torch.cat([one.sum((2, 3)) for one in maps], dim=1)


def test_a_trunk_may_give_several_maps() -> None:
    module, image = BaseModule(Pyramid(), Sums(), 16), torch.rand(1, 3, 40, 40)
    torch.testing.assert_close(module(image), Sums()(module.stream_network.module(image)), rtol=1e-4, atol=1e-4)
    assert module([image, image]).shape == (2, 12)
    with pytest.raises(ValueError, match=r"gives a list; call self\.stream_network"):
        module.forward_streaming(image)


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


class SecondGeneration(LightningStreamingModule):
    """As lightstream 1.x has it: manual optimisation, and a backward pass of the trunk by hand."""

    def __init__(self, stream_network: nn.Module) -> None:
        super().__init__(stream_network)
        self.head = make_head()
        self.automatic_optimization = False

    def train_dataloader(self) -> Any:
        return DataLoader(make_batches())  # type: ignore[arg-type]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        image, target = batch
        fmap = self.stream_network(image)
        fmap.requires_grad = self.training
        self.manual_backward(nn.functional.cross_entropy(self.head(fmap), target))
        self.stream_network.backward(image, fmap.grad)
        self.optimizers().step()  # type: ignore[union-attr]
        self.optimizers().zero_grad()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.0)


def test_modules_of_the_second_generation_train_as_plain_pytorch() -> None:
    module = SecondGeneration(StreamingModule(make_trunk(), 32))
    assert module.tile_size == (32, 32)
    train(module)
    assert_trained(module, *train_plainly(True))


class Classifies(ImageNetClassifier):
    def train_dataloader(self) -> Any:
        return DataLoader(make_batches())  # type: ignore[arg-type]


def test_the_classifier_of_the_second_generation_trains_as_plain_pytorch() -> None:
    trunk, loss = StreamingModule(make_trunk(), 32, "cache.pth"), nn.CrossEntropyLoss()
    assert (Classifies(trunk, make_head(), loss).lr, Classifies(trunk, make_head(), loss).weight_decay) == (1e-4, 1e-5)
    module = Classifies(trunk, make_head(), loss, lr=1e-2, weight_decay=0.0)
    train(module)
    assert_trained(module, *train_plainly(True, together=2))
    with pytest.raises(ValueError, match="accumulate_grad_batches=2, the trainer 3"):
        train(Classifies(trunk, make_head(), loss), accumulate_grad_batches=3)
    with pytest.raises(ValueError, match="streams already, as it was told when it was made; give tile_size there"):
        Classifies(trunk, make_head(), 64, loss)
    with pytest.raises(ValueError, match="this Classifies has a head already"):
        Classifies(module, make_head(), loss)
    with pytest.warns(UserWarning, match="the first image are at most .* but 255 stands for white"):
        train(Classifies(StreamingModule(make_trunk(), 32, value_range=(0, 255)), make_head(), loss))


def test_the_constructor_takes_its_arguments_in_the_order_of_lightstreams() -> None:
    names = list(inspect.signature(StreamingConstructor).parameters)
    assert names[:6] == ["model", "tile_size", "verbose", "deterministic", "saliency", "copy_to_gpu"]
    assert names[6:11] == ["statistics_on_cpu", "normalize_on_gpu", "mean", "std", "tile_cache"]
    assert names[11:13] == ["add_keep_modules", "before_streaming_init_callbacks"]
    assert names[13] == "after_streaming_init_callbacks"


def test_a_verbose_resnet_shows_what_lightstream_counts_as_lost(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows and columns of a tile of 2880 that its border spoils: as many at the right as below, one more above and at the left."""
    network = StreamingResNet("resnet18", 2880, num_classes=2, weights=None, verbose=True).stream_network
    printed, layers = capsys.readouterr().out, network.plan((3, 2880, 2880)).layers
    above = [2, 2, 3, 4, 5, 6, 4, 5, 3, 6, 7, 4, 5, 4, 6, 7, 4, 5, 4, 6, 7]
    lost = [(layer.lost.top, layer.lost.left, layer.lost.bottom, layer.lost.right) for layer in layers]
    assert lost == [(n, n, n - 1, n - 1) for n in above]
    assert all(layer.module_path in printed for layer in layers)


class Crops(Dataset):
    """Pyvips images whose crops are turned, and made floats from 0 to 1, by our transforms."""

    transforms = A.Compose([A.CropOrPad(80, 80), A.Flip(p=0.5), A.ToDtype("float", scale=True), A.ToTensor()])

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (90, 70, 3), dtype=np.uint8)
        return self.transforms(image=pyvips.Image.new_from_array(pixels))["image"], index % 2


def test_a_head_alone_is_trained_in_mixed_precision_on_transformed_pyvips_images() -> None:
    options: dict[str, Any] = {"num_classes": 2, "weights": None, "train_streaming_layers": False}
    module = StreamingResNet("resnet18_w8", 64, loss_fn=nn.CrossEntropyLoss(), **options)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loader = DataLoader(Crops())
    image, _ = next(iter(loader))
    assert image.shape == (1, 3, 80, 80) and 0.9 < image.max() <= 1
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader, loader)
    assert {"train_loss", "val_loss"} <= set(trainer.callback_metrics)
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and {name.split(".")[0] for name in moved} == {"head"}
