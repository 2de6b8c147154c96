"""Every component that `widefield list components` names, through all that a user does with it.

Components work inside of models, so `MODELS_BY_NAME` has small models, written as in a configuration, and a component is tested in
the first that names it: the description is checked and built; two steps of training, a checkpoint, and then nothing is left but
that file, as after a kill; a model that was built anew goes on from there to the numbers of the run that was not broken; weights
that are loaded from the last checkpoint test and predict as the model does that was trained.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.components.test_models_self_supervised import CNN, MASKS, MODEL, NORM
from tests.components.test_same_networks import LEARNERS
from widefield import RandomState
from widefield.cli import main
from widefield.cli.fit_sections import SECTIONS
from widefield.components import BaseModel, BaseSelfSupervisor, DataSample
from widefield.config import Config, build, check_config
from widefield.registry import MODELS, ComponentOf

SIDE, IMAGES, BATCH = 32, 4, 2
ARCH = {"embed_dims": 16, "num_layers": 2, "num_heads": 2, "feedforward_channels": 32}
VIT: dict[str, Any] = {"arch": ARCH, "img_size": SIDE, "patch_size": 8}
RESNET: dict[str, Any] = {"depth": 18, "stem_channels": 4, "base_channels": 4, "num_stages": 2, "out_indices": [1]}
SELF_SUP: dict[str, Any] = {"type": "SelfSupDataPreprocessor", **NORM}
POOL: dict[str, Any] = {"type": "GlobalAveragePooling"}


def classifier(backbone: dict[str, Any], neck: Any, head: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"type": "ImageClassifier", "backbone": backbone, "neck": neck, "head": head, **others}


def linear(in_channels: int, **others: Any) -> dict[str, Any]:
    return {"type": "LinearClsHead", "num_classes": 3, "in_channels": in_channels, **others}


@MODELS.register_module(name="tests.SimSiam")
class SimSiam(BaseSelfSupervisor):
    """Two views predict each other (Chen and He, 2020): a model of a user's own."""

    def loss(self, inputs: list[Tensor], data_samples: list[DataSample]) -> dict[str, Any]:
        first, second = (self.neck(self.backbone(view))[0] for view in inputs)
        return {"loss": 0.5 * (self.head.loss(first, second) + self.head.loss(second, first))}


@MODELS.register_module(name="tests.Dense")
class Dense(BaseModel):
    """Tells whether pixels are bright, by several losses of maps."""

    def __init__(self, losses: Annotated[list[dict[str, Any]], ComponentOf(MODELS, "loss")], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.network, self.losses = nn.Conv2d(3, 2, 3, padding=1), nn.ModuleList(map(MODELS.build, losses))

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
        maps, labels = self.network(inputs), (inputs.mean(1) > 0).long()
        targets = (labels, labels, labels, labels, inputs[:, :2])
        return {"loss": sum(loss(maps, target) for loss, target in zip(self.losses, targets, strict=True))}


PYRAMID: dict[str, Any] = {
    "backbone": {"type": "ResNet_CIFAR", **RESNET, "out_indices": [0, 1]},
    "head": {"type": "PyramidHead", "num_classes": 3, "in_channels": [4, 8], "width": 4},
    "tile_size": 24,
    "verify": False,
}
MODELS_BY_NAME: dict[str, dict[str, Any]] = {
    "DenseClassifier": {"type": "DenseClassifier", **PYRAMID, "loss": {"type": "DiceLoss"}},
    "DenseRegressor": {"type": "DenseRegressor", **PYRAMID},
    "losses of maps": {
        "type": "tests.Dense",
        "losses": [
            *({"type": name} for name in ("DenseCrossEntropyLoss", "DenseFocalLoss", "DiceLoss", "JaccardLoss")),
            {"type": "SSIMLoss", "window": 5},
        ],
        "data_preprocessor": {"type": "ClsDataPreprocessor", **NORM},
    },
    "ResNet, streamed": classifier(
        {"type": "ResNet", **RESNET, "streaming": {"tile_size": 16}},
        POOL,
        linear(8, cal_acc=True, loss={"type": "CrossEntropyLoss", "class_weight": [1.0, 2.0, 3.0]}),
        data_preprocessor={"type": "ClsDataPreprocessor", **NORM},
    ),
    "ResNet_CIFAR, images mixed": classifier(
        {"type": "ResNet_CIFAR", **RESNET},
        POOL,
        linear(8, loss={"type": "L1Loss"}, topk=[1, 3]),
        train_cfg={"augments": [{"type": "Mixup", "alpha": 0.8}, {"type": "CutMix", "alpha": 1.0}]},
    ),
    "ResNetV1c": classifier(
        {"type": "ResNetV1c", **RESNET, "with_cp": True},
        {"type": "GeneralizedMeanPooling"},
        {"type": "StackedLinearClsHead", "num_classes": 3, "in_channels": 8, "mid_channels": [4]},
    ),
    "ResNetV1d": classifier(
        {"type": "ResNetV1d", **RESNET, "num_stages": 1, "out_indices": [0]},
        [POOL, {"type": "ClsBatchNormNeck", "input_features": 4}],
        {"type": "ArcFaceClsHead", "num_classes": 3, "in_channels": 4},
    ),
    "ConvNeXt": classifier(
        {"type": "ConvNeXt", "arch": {"depths": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}}, None, linear(8)
    ),
    "MobileNetV2": classifier(
        {"type": "MobileNetV2", "widen_factor": 0.1, "out_indices": [4]},
        {"type": "LinearNeck", "in_channels": 16, "out_channels": 3, "gap_dim": 2},
        {"type": "ClsHead", "loss": {"type": "LabelSmoothLoss", "label_smooth_val": 0.1}},
    ),
    "MobileNetV3": classifier(
        {"type": "MobileNetV3", "arch": "small_050", "out_indices": [3]},
        POOL,
        {"type": "MultiLabelLinearClsHead", "num_classes": 3, "in_channels": 16, "loss": {"type": "FocalLoss"}},
    ),
    "EfficientNet": classifier(
        {"type": "EfficientNet", "out_indices": [2]},
        {"type": "LinearNeck", "in_channels": 24, "out_channels": 3, "gap_dim": 2},
        {"type": "MultiLabelClsHead", "loss": {"type": "AsymmetricLoss"}},
    ),
    "TimmBackbone": classifier({"type": "TimmBackbone", "name": "test_resnet", "global_pool": True}, None, linear(96)),
    "VisionTransformer": classifier(
        {"type": "VisionTransformer", **VIT, "drop_rate": 0.1},
        None,
        {"type": "VisionTransformerClsHead", "num_classes": 3, "in_channels": 16, "hidden_dim": 8},
    ),
    "BEiTViT": classifier({"type": "BEiTViT", **VIT}, None, linear(16)),
    **{
        name: classifier(
            {"type": "ResNet_CIFAR", **RESNET},
            {"type": name, "in_channels": 8, "num_classes": 3, **options},
            {"type": "ClsHead"},
        )
        for name, options in (
            ("MeanPooling", {}),
            ("MaxPooling", {}),
            ("GatedAttentionPooling", {"hidden_channels": 4}),
            ("CLAM", {"branches": "multi", "embed_channels": 8, "hidden_channels": 4}),
            ("DSMIL", {"query_channels": 4}),
            ("ABMILX", {"embed_channels": 8, "heads": 2}),
            ("TransMIL", {"embed_channels": 8, "heads": 2, "landmarks": 4}),
        )
    },
    "MAE": MODEL["MAE"],
    "BEiT v1": {**MODEL["BEiT v1"], "mask_generator": MASKS},
    "BEiT v2": MODEL["BEiT v2"],
    **{name: {**MODEL[name], "data_preprocessor": SELF_SUP} for name in ("MaskFeat", "SimCLR", "MoCo")},
    **{name: {"type": name, **description} for name, (description, _) in LEARNERS.items()},
    "SimSiam, transformer": {
        "type": "SimSiam",
        "backbone": {"type": "MoCoV3ViT", **VIT, "stop_grad_conv1": True},
        "neck": {
            "type": "MoCoV2Neck",
            "in_channels": 16,
            "hid_channels": 5,
            "out_channels": 6,
            "with_avg_pool": False,
        },
        "head": LEARNERS["SimSiam"][0]["head"],
    },
    "user's SimSiam": {
        "type": "tests.SimSiam",
        **CNN,
        "head": {
            "type": "LatentPredictHead",
            "loss": {"type": "CosineSimilarityLoss"},
            "predictor": {"type": "LinearNeck", "in_channels": 6, "out_channels": 6},
        },
        "data_preprocessor": SELF_SUP,
    },
    "ImageToImageRetriever": {
        "type": "ImageToImageRetriever",
        "image_encoder": [{"type": "ResNet", **RESNET}, POOL],
        "prototype": "features.pth",
        "head": linear(8),
        "topk": 2,
    },
}


def described(description: Any) -> Iterator[str]:
    """The components that a description names."""
    if isinstance(description, dict) and isinstance(description.get("type"), str):
        yield description["type"]
    parts = description.values() if isinstance(description, dict) else description
    for part in parts if isinstance(description, (dict, list)) else ():
        yield from described(part)


def model_of(component: str) -> str:
    """The first model that names the component, by whichever of its names."""
    target = getattr(MODELS.index.get(component), "target", None)
    names = {component, *(name for name, entry in MODELS.index.items() if entry.target == target)}
    for name, description in MODELS_BY_NAME.items():
        if names & set(described(description)):
            return name
    pytest.fail(
        f"no model tests the component {component!r}: add a small one that describes it, {{type: {component}, ...}}, to "
        f"MODELS_BY_NAME in {Path(__file__).name}, or name it in one that is there"
    )


class Images(torch.utils.data.Dataset):
    """Random images with the labels or maps, or the two views of each, that a model takes."""

    def __init__(self, description: dict[str, Any]) -> None:
        names = set(described(description))
        self.views = 3 if "SwAV" in names else int(bool(names & {"SimCLR", "MoCo", "tests.SimSiam", *LEARNERS}))
        self.several_labels = any(name.startswith("MultiLabel") for name in names)
        maps = {"DenseClassifier": lambda image: image[0] % 3, "DenseRegressor": lambda image: image / 255}
        self.target = next((make for name, make in maps.items() if name in names), None)

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[list[Tensor], DataSample | Tensor]:
        generator = torch.Generator().manual_seed(index)
        views = torch.randint(0, 256, (1 + self.views, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        if self.target is not None:
            return list(views), self.target(views[0])
        return list(views), DataSample().set_gt_label([0, 1 + index % 2] if self.several_labels else index % 3)

    def loader(self) -> DataLoader:
        return DataLoader(self, BATCH, collate_fn=_batch, generator=torch.Generator())


def _batch(items: list[tuple[list[Tensor], Any]]) -> Any:
    views = [torch.stack(view) for view in zip(*(views for views, _ in items), strict=True)]
    if isinstance(items[0][1], Tensor):
        return views[0], torch.stack([target for _, target in items])
    return {"inputs": views if len(views) > 1 else views[0], "data_samples": [sample for _, sample in items]}


@dataclass(frozen=True)
class Trained:
    """A model after two epochs of two steps, and what its weights were before."""

    model: Any
    before: dict[str, Tensor]


def built(description: dict[str, Any], seed: int) -> Any:
    config = Config({"model": description})
    check_config(config, SECTIONS)
    torch.manual_seed(seed)
    model = build(config, ("model",))
    model.init_weights()
    return model


def trained(description: dict[str, Any]) -> Trained:
    """Train, break off, go on, test and predict, in the current folder; see the head of this file."""
    torch.save(torch.rand(5, 8, generator=torch.Generator().manual_seed(0)), Path("features.pth"))
    loader = Images(description).loader()

    def trainer(saves: bool = False) -> Trainer:
        callbacks = [ModelCheckpoint("run", "{epoch}", save_top_k=-1, enable_version_counter=False)] if saves else []
        shown = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        options: dict[str, Any] = {**shown, "enable_checkpointing": saves, "callbacks": [*callbacks, RandomState()]}
        return Trainer(max_epochs=2, accelerator="cpu", devices=1, **options)

    model = built(description, seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    unbroken = trainer(saves=True)
    unbroken.fit(model, loader)
    assert unbroken.global_step == 2 * IMAGES // BATCH
    assert all(value.isfinite() for value in unbroken.callback_metrics.values())

    resumed = built(description, seed=1)
    trainer(saves=True).fit(resumed, loader, ckpt_path="run/epoch=0.ckpt", weights_only=True)
    assert_same(resumed.state_dict(), model.state_dict())

    loaded = type(model).load_from_checkpoint("run/epoch=1.ckpt", weights_only=True)
    results = []
    for one in (model, loaded):
        torch.manual_seed(2)  # of the masks
        results.append(trainer().test(one, loader, verbose=False)[0])
    assert results[0] == results[1]
    assert "test_loss" in results[0]
    if hasattr(model, "predict"):
        samples = [sample for batch in trainer().predict(loaded, loader) or [] for sample in batch]
        assert len(samples) == IMAGES
        assert all("pred_score" in sample and "pred_label" in sample for sample in samples)
    return Trained(model, before)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert [key for key, value in one.items() if not torch.equal(value, other[key])] == []


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Trained]]:
    """Trains a model of MODELS_BY_NAME once, whatever number of components it tests."""
    done: dict[str, Trained] = {}

    def once(name: str) -> Trained:
        if name not in done:
            folder = tmp_path_factory.mktemp("run")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                done[name] = trained(MODELS_BY_NAME[name])
        return done[name]

    yield once
    del MODELS._registered["tests.SimSiam"], MODELS._registered["tests.Dense"]


def parts_of(model: nn.Module, component: str) -> dict[str, nn.Module]:
    """The parts of a model that are such components, by name."""
    return {name: part for name, part in model.named_modules() if type(part) is MODELS.get(component)}


@pytest.mark.filterwarnings(
    "ignore:Found .* in eval mode at the start of training"
)  # target generators are meant to be
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # where the run goes on
@pytest.mark.parametrize("component", list(MODELS.index))
def test_a_component_is_built_trained_resumed_and_tested(component: str, train: Callable[[str], Trained]) -> None:
    run = train(model_of(component))
    parts = parts_of(run.model, component)
    assert parts, "the description was built to something else"
    learns = MODELS.kind(component) != "target_generator"
    for name, part in parts.items():
        prefix = f"{name}." if name else ""
        weights = {prefix + key: value for key, value in part.named_parameters()}
        moved = [key for key, value in weights.items() if not torch.equal(value, run.before[key])]
        assert bool(moved) is (learns and any(value.requires_grad for value in weights.values()))


def test_the_components_that_are_tested_are_those_that_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "components"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed - {"tests.SimSiam", "tests.Dense"} == set(MODELS.index)


def test_a_component_without_a_model_fails_and_says_what_to_add() -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"add a small one that describes it, \{type: NewNeck, \.\.\.\}, to MODEL"
    ):
        model_of("NewNeck")
