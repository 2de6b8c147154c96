"""`DenseModule`: networks that give maps train as in plain PyTorch, and their metrics are those of all pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from lightning.pytorch import LightningDataModule, Trainer
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassF1Score, MulticlassJaccardIndex
from torchmetrics.functional import r2_score

from tests.streaming.exactness import TOLERANCE, relative_error
from widefield.components.losses.dense_losses import MAP_LOSSES, DenseCrossEntropyLoss, DiceLoss, JaccardLoss
from widefield.components.metrics.dense_metrics import SegmentationScores
from widefield.errors import WrongArgumentError
from widefield.images import open_image
from widefield.modules import DenseModule

CLASSES, SIZE = 3, (45, 51)
WEIGHTS = [1.0, 2.0, 0.5]


def network(classes: int = CLASSES, stride: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, classes, 3, stride, 1)).double()


def image(n: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.rand(n, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def labels(n: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    found = torch.randint(0, CLASSES, (n, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found[:, 5:9, 7:] = 255
    return found


def module(net: nn.Module, classes: int = CLASSES, **options: Any) -> DenseModule:
    return DenseModule(net, classes, **{"tile_size": (16, 20), "verify": False, **options})


def step(dense: DenseModule, batch: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The loss of a batch, outside of a trainer."""
    monkeypatch.setattr(dense, "log", lambda *_, **__: None)
    return dense.training_step(batch, 0)


def test_a_loss_of_ones_own_is_known_by_its_short_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MAP_LOSSES, "_registered", dict(MAP_LOSSES._registered))
    MAP_LOSSES.register_module("hinge", kind="segmentation", module=Hinge)
    assert type(module(network(), loss="hinge").stream_network.module.loss) is Hinge


def named(task: str) -> list[tuple[str, int]]:
    """The losses with a short name, and how much smaller than its target the map is for each."""
    return [(name, 1 + k % 4) for k, name in enumerate(MAP_LOSSES.names(task))]


@pytest.mark.parametrize(("name", "stride"), named("segmentation"))
def test_a_step_with_a_loss_inside_has_the_gradients_of_plain_pytorch(
    name: str, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x, y = network(stride=stride), image(), labels()
    logits = functional.interpolate(net(x), size=SIZE, mode="bilinear", align_corners=False)
    expected = MAP_LOSSES.get(name)(class_weights=WEIGHTS)(logits, y)
    found = step(module(net, loss=name, class_weights=WEIGHTS), (x, y), monkeypatch)
    assert relative_error(found, expected) <= TOLERANCE
    pairs = zip(*(torch.autograd.grad(loss, list(net.parameters())) for loss in (found, expected)), strict=True)
    assert all(relative_error(f, e) <= TOLERANCE for f, e in pairs)


class Hinge(nn.Module):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (1 - logits[:, 1]).relu().mean()


@pytest.mark.parametrize(
    ("loss", "weighted"),
    [
        ({"type": "DiceLoss", "whole_batch": True}, DiceLoss(whole_batch=True, class_weights=WEIGHTS)),
        ({"class_path": "JaccardLoss"}, JaccardLoss(class_weights=WEIGHTS)),
        ({"type": Hinge}, None),
    ],
    ids=["type", "class_path", "without class weights and ignored labels"],
)
def test_a_described_loss_gets_what_it_takes(loss: dict[str, Any], weighted: nn.Module | None) -> None:
    net = network()
    options = {} if weighted is None else {"class_weights": WEIGHTS}
    found = module(net, loss=loss, **options).stream_network.module.loss
    expected = Hinge() if weighted is None else weighted
    torch.testing.assert_close(found(net(image(1)), labels(1)), expected(net(image(1)), labels(1)))
    if weighted is None:
        with pytest.raises(WrongArgumentError, match="class_weights are for the losses"):
            module(net, loss=loss, class_weights=WEIGHTS)


@pytest.mark.parametrize(("name", "stride"), named("regression"))
def test_maps_of_numbers_are_learnt_likewise(name: str, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = network(2, stride), image(), torch.rand(2, 2, *SIZE, dtype=torch.float64)

    def whole() -> Tensor:
        return functional.interpolate(net(x), size=SIZE, mode="bilinear", align_corners=False)

    dense = module(net, 2, task="regression", loss=name)
    loss = MAP_LOSSES.get(name)
    loss = loss() if isinstance(loss, type) else loss
    found, expected = step(dense, (x, y), monkeypatch), loss(whole(), y)
    assert relative_error(found, expected) <= TOLERANCE
    pairs = zip(*(torch.autograd.grad(loss, list(net.parameters())) for loss in (found, expected)), strict=True)
    assert all(relative_error(f, e) <= TOLERANCE for f, e in pairs)
    with torch.no_grad():
        dense.eval().validation_step((x, y), 0)
    values, error = dense.scores["val_scores"].compute(), (whole() - y).detach()
    assert float(values["mae"]) == pytest.approx(float(error.abs().mean()), 1e-6)
    assert float(values["rmse"]) == pytest.approx(float(error.square().mean().sqrt()), 1e-6)
    pixels = [each.movedim(1, -1).reshape(-1, 2) for each in (whole().detach(), y)]
    assert float(values["r2"]) == pytest.approx(float(r2_score(*pixels)), 1e-6)


class TwoMaps(nn.Module):
    """A network with an auxiliary map, as torchvision's segmentation models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        size = x.shape[-2:]
        maps = {"out": self.head(features), "aux": self.second(features)}
        return {name: functional.interpolate(one, size=size, mode="bilinear") for name, one in maps.items()}


def test_the_loss_of_an_auxiliary_map_counts_half_and_a_function_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, y = TwoMaps().double(), image(), labels()

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(logits, target, ignore_index=255)

    maps = net(x)
    expected = loss(maps["out"], y.long()) + 0.5 * loss(maps["aux"], y.long())
    found = step(module(net, loss=loss), (x, y), monkeypatch)
    assert relative_error(found, expected) <= TOLERANCE
    pairs = zip(*(torch.autograd.grad(one, list(net.parameters())) for one in (found, expected)), strict=True)
    assert all(relative_error(f, e) <= TOLERANCE for f, e in pairs)


def test_a_run_of_the_trainer_leaves_the_parameters_of_plain_pytorch() -> None:
    net, batches = network(), [(image(1), labels(1)), (image(2), labels(2))]
    plain = network()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    for x, y in batches:
        optimizer.zero_grad()
        DiceLoss()(plain(x), y).backward()
        optimizer.step()
    dense = module(net, loss="dice", lr=1e-2, weight_decay=0.1)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", precision="64-true", enable_model_summary=False, **quiet)
    loader = DataLoader(batches, batch_size=None)
    trainer.fit(dense, loader, loader)
    for found, expected in zip(net.parameters(), plain.parameters(), strict=True):
        assert relative_error(found, expected) <= TOLERANCE
    iou, dice = MulticlassJaccardIndex(CLASSES, ignore_index=255), MulticlassF1Score(CLASSES, ignore_index=255)
    for x, y in batches:
        for metric in (iou, dice):
            metric.update(plain(x), y.long())
    values = trainer.callback_metrics
    assert float(values["val_mean_iou"]) == pytest.approx(float(iou.compute()), abs=1e-6)
    assert float(values["val_dice"]) == pytest.approx(float(dice.compute()), abs=1e-6)
    counts = dense.tables["val_confusion_matrix"]
    assert int(counts.sum()) == sum(int((y != 255).sum()) for _, y in batches)
    (predicted,) = trainer.predict(dense, DataLoader([image(1)], batch_size=None))
    assert relative_error(predicted, plain(image(1)).softmax(1)) <= TOLERANCE


def test_lazily_read_images_and_label_maps_of_different_sizes_are_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    net, pixels, maps = network(), np.random.default_rng(0).random((2, 3, 60, 50)), labels(2, (60, 50))
    sizes = [(60, 50), (40, 33)]
    arrays = [(pixels[k, :, :h, :w], maps[k, :h, :w].numpy()) for k, (h, w) in enumerate(sizes)]
    images, targets = ([open_image(array) for array in kind] for kind in zip(*arrays, strict=True))
    found = step(module(net), (images, targets), monkeypatch)
    each = [
        functional.cross_entropy(net(torch.from_numpy(x)[None]), torch.from_numpy(y)[None].long(), ignore_index=255)
        for x, y in arrays
    ]
    assert relative_error(found, torch.stack(each).mean()) <= TOLERANCE


def test_scores_know_classes_that_are_not_there() -> None:
    scores = SegmentationScores(["a", "b", "c"])
    scores.update(torch.tensor([[3.0, 1, 0], [2, 4, 0], [0, 0, 0]]))
    values = scores.compute()
    assert values["iou_a"] == 0.5 and values["iou_c"].isnan()
    assert float(values["mean_iou"]) == pytest.approx((3 / 6 + 4 / 7) / 2)
    assert float(values["accuracy"]) == pytest.approx(0.7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"])
def test_segmentation_models_of_torchvision_train_exactly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {} if name.startswith("lraspp") else {"aux_loss": True}
    net = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=CLASSES, **options)
    net, x, y = net.double().eval(), image(1, (75, 83)), labels(1, (75, 83))
    maps = net(x)
    loss = DiceLoss()
    expected = loss(maps["out"], y) + (0.5 * loss(maps["aux"], y) if "aux" in maps else 0)
    found = step(module(net, loss="dice", tile_size=32), (x, y), monkeypatch)
    assert relative_error(found, expected) <= TOLERANCE
    pairs = zip(*(torch.autograd.grad(one, list(net.parameters())) for one in (found, expected)), strict=True)
    assert all(relative_error(f, e) <= TOLERANCE for f, e in pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes=1 must be a whole number of at least 2"),
        ({"ignore_index": 2}, "ignore_index=2 is one of the 3 classes"),
        ({"loss": "dicee"}, "loss: there is no 'dicee' for segmentation; did you mean dice"),
        ({"loss": "l1"}, "loss: there is no 'l1' for segmentation"),
        ({"loss": functional.mse_loss, "class_weights": WEIGHTS}, "class_weights are for the losses"),
        ({"class_weights": [1.0]}, "there are 1 class_weights, and num_classes=3"),
        ({"class_names": ["a"]}, "there are 1 class_names, and num_classes=3"),
        ({"task": "detection"}, "task='detection' must be"),
        ({"network": lambda x: x}, "is no torch.nn.Module"),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else None,
)
def test_arguments_that_cannot_be_used_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongArgumentError, match=message):
        DenseModule(**{"network": network(), "num_classes": CLASSES, **options})


def test_labels_and_maps_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = labels(1)
    wrong[0, 3, 3] = 7
    with pytest.raises(WrongArgumentError, match="the label 7 is neither a class, from 0 to 2, nor ignore_index=255"):
        step(module(network()), (image(1), wrong), monkeypatch)
    with pytest.raises(ValueError, match="maps of 4 channels, and num_classes=3"):
        step(module(network(4)), (image(1), labels(1)), monkeypatch)
    with pytest.raises(ValueError, match="a batch of 2 images has 1 targets"):
        step(module(network()), ([image(1), image(1)], [labels(1)]), monkeypatch)
    with pytest.raises(ValueError, match=r"gives a map of shape .* and the target has"):
        dense = module(network(2), 2, task="regression")
        step(dense, (image(1), torch.rand(1, 3, *SIZE, dtype=torch.float64)), monkeypatch)


class Counted(LightningDataModule):
    """One image whose labels are counted as those of a `SegmentedImages`."""

    def train_dataloader(self) -> Any:
        return DataLoader([(image(1), labels(1))], batch_size=None)

    def class_counts(self) -> np.ndarray:
        return np.bincount(labels(1)[labels(1) < CLASSES].numpy(), minlength=CLASSES)


@pytest.mark.filterwarnings("ignore:You have overridden `transfer_batch_to_device`")
def test_balanced_class_weights_are_those_of_the_counts_and_stand_in_the_checkpoint(tmp_path: Path) -> None:
    net = network()
    dense = module(net, class_weights="balanced")
    weights = compute_class_weight("balanced", classes=np.arange(3), y=labels(1)[labels(1) < CLASSES].numpy())
    expected = DenseCrossEntropyLoss(class_weights=weights.tolist())(net(image(1)), labels(1))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer, another = (Trainer(max_epochs=1, accelerator="cpu", **quiet) for _ in range(2))  # type: ignore[arg-type]
    trainer.fit(dense, Counted())
    assert dense.class_weights == pytest.approx(weights.tolist())
    assert float(trainer.callback_metrics["train_loss"]) == pytest.approx(float(expected.detach()), 1e-6)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other = module(network(), class_weights="balanced")
    other.on_load_checkpoint(torch.load(tmp_path / "one.ckpt", weights_only=True))
    assert other.class_weights == dense.class_weights
    with pytest.raises(WrongArgumentError, match="counts the label maps of a data module SegmentedImages"):
        another.fit(module(network(), class_weights="balanced"), DataLoader([(image(1), labels(1))], batch_size=None))
    for options in ({"class_weights": "equal"}, {"class_weights": "balanced", "loss": functional.cross_entropy}):
        with pytest.raises(WrongArgumentError, match=r"class_weights(='equal' must be| are for the losses)"):
            module(network(), **options)
