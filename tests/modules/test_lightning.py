"""Everything a Lightning trainer does around a step: what it gives equals the plain module in the same trainer."""

import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnxruntime
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from tests.fresh import fresh
from tests.streaming.exactness import relative_error
from widefield.models.resnet import StreamingResNet
from widefield.modules import AtomicCheckpointIO, BaseModule, ImageNetClassifier, RandomState, StreamingModule
from widefield.streaming import StreamingCNN


def trunk() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6, 4, 3))
    nn.init.uniform_(layers[1].weight, 0.5, 2)  # type: ignore[arg-type]
    return layers.double()


def head() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()


def images(count: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    return TensorDataset(torch.rand(count, 3, 41, 38, generator=generator).double(), torch.arange(count) % 2)


def trainer(folder: Path | None = None, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "enable_checkpointing": folder is not None, "default_root_dir": folder}
    return pl.Trainer(**(settings | options))


def optimizers(module: pl.LightningModule) -> Any:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1, 0.5)}


class Plain(pl.LightningModule):
    """The same model without streaming."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*trunk(), *head())

    def on_train_epoch_start(self) -> None:
        self.net[1].eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    configure_optimizers = optimizers


class Inherits(StreamingModule):
    configure_optimizers = optimizers  # type: ignore[assignment]


class TwoParts(Inherits):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_fn(self.forward_head(self.forward_streaming(batch[0])), batch[1])


OPTIONS: dict[str, dict[str, Any]] = {
    "accumulated": {"accumulate_grad_batches": 2},  # five batches: the last group is incomplete
    "norm clipped": {"gradient_clip_val": 0.05},
    "values clipped": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "averaged weights": {"callbacks": [EMAWeightAveraging(decay=0.5)]},
    "64-true": {"precision": "64-true"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("kind", [Inherits, TwoParts])
def test_the_trainers_options_act_as_on_the_plain_module(kind: type[StreamingModule], options: dict[str, Any]) -> None:
    module, plain = kind(trunk(), head(), 16, nn.functional.cross_entropy), Plain()
    for one in (module, plain):
        trainer(**copy.deepcopy(options)).fit(one, DataLoader(images()))
    weights = [*module.stream_network.module.state_dict().values(), *module.head.state_dict().values()]
    assert not torch.equal(weights[0], trunk()[0].weight)
    for found, expected in zip(weights, plain.net.state_dict().values(), strict=True):
        assert relative_error(found, expected) < 1e-10


@pytest.mark.filterwarnings("ignore:You passed `Trainer\\(accelerator='cpu', precision='16-mixed'")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_near_the_plain_module_in_it(precision: str) -> None:
    module, plain = Inherits(trunk(), head(), 16, nn.functional.cross_entropy).float(), Plain().float()
    data = TensorDataset(images().tensors[0].float(), images().tensors[1])
    for one in (module, plain):
        trainer(precision=precision, max_epochs=1).fit(one, DataLoader(data))
    assert relative_error(module.stream_network.module[0].weight, plain.net[0].weight) < 0.02  # type: ignore[index, union-attr]


def test_checkpoints_and_early_stopping_follow_what_is_logged(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, "best", monitor="val_loss")
    stopping = EarlyStopping("val_loss", patience=0, min_delta=100.0)
    module = StreamingModule(trunk(), head(), 16, nn.functional.cross_entropy)
    run = trainer(tmp_path, callbacks=[best, stopping], max_epochs=9)
    run.fit(module, DataLoader(images()), DataLoader(images()))
    assert run.current_epoch == 2
    weights = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert {key.split(".")[0] for key in weights} == {"stream_network", "head"}
    predictions = run.predict(module, DataLoader(images()))
    assert predictions is not None and torch.cat(predictions).shape == (5, 2)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("kind", [Inherits, TwoParts])
def test_a_resumed_run_gives_the_numbers_of_an_unbroken_one(kind: type[StreamingModule], tmp_path: Path) -> None:
    def run(epochs: int, resume_from: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = kind(nn.Sequential(*trunk(), nn.Dropout(0.3)), head(), 16, nn.functional.cross_entropy)
        callbacks = [RandomState(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)]
        options = {"callbacks": callbacks, "plugins": [AtomicCheckpointIO()], "max_epochs": epochs}
        loader = DataLoader(images(), shuffle=True)
        trainer(tmp_path, **options).fit(module, loader, DataLoader(images()), ckpt_path=resume_from, weights_only=True)
        return module.state_dict()

    unbroken, resumed = run(3), run(3, tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(resumed[key], value) for key, value in unbroken.items())


class Killed(Inherits):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == 2 and batch_idx == 3:
            os.kill(os.getpid(), signal.SIGKILL)


def train_or_resume(kind: type[StreamingModule], folder: Path) -> None:
    torch.set_num_threads(
        1
    )  # renews torch's pool of threads after the fork, before threads of autograd could do so at once
    torch.manual_seed(0)
    module = kind(trunk(), head(), 16, nn.functional.cross_entropy)
    last = folder / "last.ckpt"
    callbacks = [RandomState(), ModelCheckpoint(folder, save_last=True, save_top_k=0)]
    run = trainer(folder, max_epochs=4, plugins=[AtomicCheckpointIO()], callbacks=callbacks)
    ckpt_path = last if last.exists() else None
    run.fit(module, DataLoader(images(), shuffle=True), ckpt_path=ckpt_path, weights_only=True)
    torch.save(module.state_dict(), folder / "weights.pt")


@fresh
def test_a_killed_run_resumes_from_its_last_epoch(tmp_path: Path) -> None:
    def exit_code(kind: type[StreamingModule], folder: Path) -> int | None:
        process = multiprocessing.get_context("fork").Process(target=train_or_resume, args=(kind, folder))
        process.start()
        process.join(120)
        return process.exitcode

    StreamingCNN(trunk(), 16).plan((3, 64, 64))  # imports what the processes would import each
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert exit_code(Inherits, unbroken) == 0
    assert exit_code(Killed, broken) == -signal.SIGKILL
    assert not (broken / "weights.pt").exists()
    assert exit_code(Inherits, broken) == 0
    first, second = (torch.load(folder / "weights.pt", weights_only=True) for folder in (unbroken, broken))
    assert all(torch.equal(second[key], value) for key, value in first.items())


SAVE = """
import sys, torch
from widefield import AtomicCheckpointIO
print("ready", flush=True)
while True:
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(4_000_000)}, sys.argv[1])
"""


def test_a_checkpoint_is_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1)}, path)
    process = subprocess.Popen([sys.executable, "-c", SAVE, path], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(20):
        assert bool((torch.load(path, weights_only=True)["weights"] == 1).all())
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert bool((torch.load(path, weights_only=True)["weights"] == 1).all())


@pytest.mark.parametrize("schedule", [StepLR, ReduceLROnPlateau])
def test_optimizer_and_schedule_are_arguments(schedule: Any) -> None:
    options = (
        {"step_size": 1, "gamma": 0.5} if schedule is StepLR else {"patience": 0, "factor": 0.5, "threshold": 100.0}
    )
    module = StreamingModule(
        trunk(), head(), 16, nn.functional.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=0.1), lr_scheduler=partial(schedule, **options),
    )  # fmt: skip
    run = trainer(max_epochs=2)
    run.fit(module, DataLoader(images()), DataLoader(images()))
    assert run.optimizers[0].param_groups[0]["lr"] == 0.025


def test_strategies_that_split_parameters_are_refused() -> None:
    module = StreamingModule(trunk(), head(), 16, nn.functional.cross_entropy)
    run = trainer()
    module._trainer = run
    run._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(ValueError, match=r'FSDPStrategy splits .* use strategy="ddp"'):
        module.setup("fit")


def test_weight_averaging_that_resets_frozen_norm_layers_is_refused() -> None:
    module = StreamingModule(trunk(), head(), 16, nn.functional.cross_entropy)
    with pytest.raises(ValueError, match="use EMAWeightAveraging"):
        trainer(callbacks=[StochasticWeightAveraging(1e-2)]).fit(module, DataLoader(images()))


def test_one_logit_is_a_probability() -> None:
    module = ImageNetClassifier(
        trunk(), nn.Sequential(*head()[:2], nn.Linear(4, 1).double()), 16, nn.BCEWithLogitsLoss()
    )
    probability = module.predict_step(images().tensors[0], 0)
    torch.testing.assert_close(probability, module(images().tensors[0]).sigmoid())


def test_batches_without_targets_are_refused_in_training() -> None:
    module, (image, *_) = StreamingModule(trunk(), head(), 16, nn.functional.cross_entropy), images().tensors
    with pytest.raises(ValueError, match="got a dict of image, label; let the data set return a pair"):
        module.training_step({"image": image, "label": None}, 0)
    assert torch.equal(module.predict_step((image, ["a", "b", "c", "d", "e"]), 0), module(image))


class Images(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.rand(2, 3, 64, 70), torch.tensor([0, 1])))

    val_dataloader = test_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:.*args parameter is intended")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:You have overridden `transfer_batch_to_device`")
def test_lightning_cli_makes_the_module_from_yaml(tmp_path: Path) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(
        "seed_everything: 3\n"
        "trainer: {max_epochs: 1, accelerator: cpu, logger: false, enable_progress_bar: false}\n"
        "model:\n"
        "  model_name: resnet18\n"
        "  tile_size: [64, null]\n"
        "  num_classes: 2\n"
        "  weights: null\n"
        "  loss_fn: torch.nn.CrossEntropyLoss\n"
        "  metrics: {class_path: torchmetrics.classification.MulticlassAccuracy, init_args: {num_classes: 2}}\n"
        "  memory_budget: 1GiB\n"
        "  optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1}}\n"
        "  lr_scheduler: {class_path: torch.optim.lr_scheduler.StepLR, init_args: {step_size: 1, gamma: 0.5}}\n"
    )
    arguments = ["fit", "--config", str(config), f"--trainer.default_root_dir={tmp_path}"]
    cli = LightningCLI(StreamingResNet, Images, args=arguments, auto_configure_optimizers=False)
    assert cli.model.tile_size == (64, None)
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["lr"] == 0.05
    assert {"train_loss", "val_loss", "val_MulticlassAccuracy"} <= set(cli.trainer.callback_metrics)


def test_weights_of_two_parts_that_were_never_one_model_have_no_plain_names() -> None:
    with pytest.raises(ValueError, match=r"trunk and head both have '2\.bias'"):
        BaseModule(nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Conv2d(3, 4, 1)), head()).plain_state_dict()


def deployed() -> tuple[ImageNetClassifier, Tensor]:
    options: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)}
    module = ImageNetClassifier(trunk(), head(), 16, None, **options).float().train()
    return module, torch.randint(0, 256, (2, 3, 50, 60), dtype=torch.uint8)


def test_the_plain_model_is_exported() -> None:
    module, image = deployed()
    dynamic = {"image": {2: torch.export.Dim("height", min=16), 3: torch.export.Dim("width", min=16)}}
    plain = module.plain_model()
    assert module.training and not plain.training
    exported = torch.export.export(plain, (image,), dynamic_shapes=dynamic).module()
    for one in (image, image[..., 5:, 7:]):
        torch.testing.assert_close(exported(one), module(one))


@pytest.mark.filterwarnings("ignore")
def test_the_plain_model_becomes_onnx(tmp_path: Path) -> None:
    module, image = deployed()
    dynamic = {"image": {2: torch.export.Dim("height", min=16), 3: torch.export.Dim("width", min=16)}}
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        module.plain_model(),
        (image,),
        str(path),
        input_names=["image"],
        dynamic_shapes=dynamic,
        dynamo=True,
        verbose=False,
    )
    module.to_onnx(tmp_path / "other.onnx", image, input_names=["image"], dynamo=True, verbose=False)
    assert (tmp_path / "other.onnx").exists()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for one in (image, image[..., 5:, 7:]):
        (found,) = session.run(None, {"image": one.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(one).detach(), rtol=1e-4, atol=1e-5)
