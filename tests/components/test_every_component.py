"""Every component that `widefield list components` names, through all that a user does with it.

Components work inside of models, so `MODELS_BY_NAME` has small models, written as in a configuration, and a component is tested in
the first that names it, or else in the one that `by_default` puts around it: the description is checked and built; two steps of
training, a checkpoint, and then nothing is left but that file, as after a kill; a model that was built anew goes on from there to
the numbers of the run that was not broken; weights that are loaded from the last checkpoint test and predict as the model does that
was trained.
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
from widefield.components.losses.dense_losses import MAP_LOSSES
from widefield.config import Config, build, check_config
from widefield.registry import MODELS, ComponentOf, arguments_of

SIDE, IMAGES, BATCH = 32, 4, 2
ARCH = {"embed_dims": 16, "num_layers": 2, "num_heads": 2, "feedforward_channels": 32}
VIT: dict[str, Any] = {"arch": ARCH, "img_size": SIDE, "patch_size": 8}
RESNET: dict[str, Any] = {"depth": 18, "stem_channels": 4, "base_channels": 4, "num_stages": 2, "out_indices": [1]}
SELF_SUP: dict[str, Any] = {"type": "SelfSupDataPreprocessor", **NORM}
POOL: dict[str, Any] = {"type": "GlobalAveragePooling"}


SMALL: dict[str, Any] = {
    **RESNET,
    **{"in_channels": 8, "num_classes": 3, "embed_channels": 8, "hidden_channels": 4, "query_channels": 4, "heads": 2},
    **{"branches": "multi", "landmarks": 4, "window": 5},
}
"""Arguments that components have, by name, if a model is made for them."""
QUIET: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False
)
TASKS = {entry.target: entry.kind for entry in MAP_LOSSES.entries()}


def label(index: int, image: Tensor) -> DataSample:
    return DataSample().set_gt_label(index % 3)


def labels(index: int, image: Tensor) -> DataSample:
    return DataSample().set_gt_label([0, 1 + index % 2])


@dataclass(frozen=True)
class Case:
    """A model, written as in a configuration, and what it is trained on: views of each image, and a target of (index, image)."""

    description: dict[str, Any]
    views: int = 1
    target: Callable[[int, Tensor], Any] = label


def classifier(backbone: dict[str, Any], neck: Any, head: dict[str, Any], **others: Any) -> Case:
    target = labels if head["type"].startswith("MultiLabel") else label
    return Case({"type": "ImageClassifier", "backbone": backbone, "neck": neck, "head": head, **others}, target=target)


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
        self.tasks = [TASKS[MODELS.index[one["type"]].target] for one in losses]

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Any]:
        maps, targets = self.network(inputs), {"segmentation": (inputs.mean(1) > 0).long(), "regression": inputs[:, :2]}
        return {"loss": sum(loss(maps, targets[task]) for loss, task in zip(self.losses, self.tasks, strict=True))}


def small(component: str) -> dict[str, Any]:
    """A description of a component with small arguments."""
    known = arguments_of(MODELS.get(component)).named
    images = {"in_channels": 3} if MODELS.kind(component) == "backbone" else {}
    return {"type": component, **{name: value for name, value in {**SMALL, **images}.items() if name in known}}


def by_default(component: str) -> Case | None:
    """A classifier with a component of its kind; None where a model must be written for the kind."""
    kind = MODELS.index[component].kind if component in MODELS.index else None
    backbone: dict[str, Any] = {"type": "ResNet_CIFAR", **RESNET}
    if kind == "loss":
        return classifier(backbone, POOL, linear(8, loss=small(component)))
    if kind == "head":
        return classifier(backbone, POOL, small(component))
    if kind == "neck":
        gives_scores = "num_classes" in arguments_of(MODELS.get(component)).named
        return classifier(backbone, small(component), {"type": "ClsHead"} if gives_scores else linear(8))
    if kind == "backbone":
        with torch.no_grad():
            out = MODELS.build(small(component)).eval()(torch.zeros(1, 3, SIDE, SIDE))[-1]
        return classifier(small(component), POOL if out.ndim == 4 else None, linear(out.shape[1]))
    return None


PYRAMID: dict[str, Any] = {
    "backbone": {"type": "ResNet_CIFAR", **RESNET, "out_indices": [0, 1]},
    "head": {"type": "PyramidHead", "num_classes": 3, "in_channels": [4, 8], "width": 4},
    "tile_size": 24,
    "verify": False,
}
MODELS_BY_NAME: dict[str, Case] = {
    "DenseClassifier": Case(
        {"type": "DenseClassifier", **PYRAMID, "loss": {"type": "DiceLoss"}}, target=lambda _, image: image[0] % 3
    ),
    "DenseRegressor": Case({"type": "DenseRegressor", **PYRAMID}, target=lambda _, image: image / 255),
    "losses of maps": Case(
        {
            "type": "tests.Dense",
            "losses": [small(name) for name, entry in MODELS.index.items() if entry.target in TASKS],
            "data_preprocessor": {"type": "ClsDataPreprocessor", **NORM},
        }
    ),
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
    "MAE": Case(MODEL["MAE"]),
    "BEiT v1": Case({**MODEL["BEiT v1"], "mask_generator": MASKS}),
    "BEiT v2": Case(MODEL["BEiT v2"]),
    "MaskFeat": Case({**MODEL["MaskFeat"], "data_preprocessor": SELF_SUP}),
    **{name: Case({**MODEL[name], "data_preprocessor": SELF_SUP}, views=2) for name in ("SimCLR", "MoCo")},
    **{
        name: Case({"type": name, **description}, views=4 if name == "SwAV" else 2)
        for name, (description, _) in LEARNERS.items()
    },
    "SimSiam, transformer": Case(
        {
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
        views=2,
    ),
    "user's SimSiam": Case(
        {
            "type": "tests.SimSiam",
            **CNN,
            "head": {
                "type": "LatentPredictHead",
                "loss": {"type": "CosineSimilarityLoss"},
                "predictor": {"type": "LinearNeck", "in_channels": 6, "out_channels": 6},
            },
            "data_preprocessor": SELF_SUP,
        },
        views=2,
    ),
    "ImageToImageRetriever": Case(
        {
            "type": "ImageToImageRetriever",
            "image_encoder": [{"type": "ResNet", **RESNET}, POOL],
            "prototype": "features.pth",
            "head": linear(8),
            "topk": 2,
        }
    ),
}


def described(description: Any) -> Iterator[str]:
    """The components that a description names."""
    if isinstance(description, dict) and isinstance(description.get("type"), str):
        yield description["type"]
    parts = description.values() if isinstance(description, dict) else description
    for part in parts if isinstance(description, (dict, list)) else ():
        yield from described(part)


def case_of(component: str) -> tuple[str, Case]:
    """The first model that names the component, by whichever of its names, or the default one."""
    target = getattr(MODELS.index.get(component), "target", None)
    names = {component, *(name for name, entry in MODELS.index.items() if entry.target == target)}
    for name, case in MODELS_BY_NAME.items():
        if names & set(described(case.description)):
            return name, case
    case = by_default(component)
    return (
        (component, case)
        if case
        else pytest.fail(
            f"no model tests the component {component!r}: add a small one that describes it, {{type: {component}, ...}}, to "
            f"MODELS_BY_NAME in {Path(__file__).name}, or name it in one that is there"
        )
    )


class Images(torch.utils.data.Dataset):
    """Random images with what a model takes."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[list[Tensor], Any]:
        generator = torch.Generator().manual_seed(index)
        views = torch.randint(0, 256, (self.case.views, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        return list(views), self.case.target(index, views[0])

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


def trained(case: Case) -> Trained:
    """Train, break off, go on, test and predict, in the current folder; see the head of this file."""
    torch.save(torch.rand(5, 8, generator=torch.Generator().manual_seed(0)), Path("features.pth"))
    loader = Images(case).loader()

    def trainer(saves: bool = False) -> Trainer:
        callbacks = [ModelCheckpoint("run", "{epoch}", save_top_k=-1, enable_version_counter=False)] if saves else []
        options: dict[str, Any] = {**QUIET, "enable_checkpointing": saves, "callbacks": [*callbacks, RandomState()]}
        return Trainer(max_epochs=2, accelerator="cpu", devices=1, **options)

    model = built(case.description, seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    unbroken = trainer(saves=True)
    unbroken.fit(model, loader)
    assert unbroken.global_step == 2 * IMAGES // BATCH
    assert all(value.isfinite() for value in unbroken.callback_metrics.values())

    resumed = built(case.description, seed=1)
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
    """Trains the model of a component once, whatever number of components it tests."""
    done: dict[str, Trained] = {}

    def once(component: str) -> Trained:
        name, case = case_of(component)
        if name not in done:
            folder = tmp_path_factory.mktemp("run")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                done[name] = trained(case)
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
    run = train(component)
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


@pytest.mark.parametrize("component", ["ResNet_CIFAR", "GeneralizedMeanPooling", "LinearClsHead", "CrossEntropyLoss"])
def test_a_component_of_a_kind_with_a_default_needs_no_model_of_its_own(component: str) -> None:
    case = by_default(component)
    assert case is not None and component in described(case.description)
    trainer = Trainer(max_steps=1, accelerator="cpu", **QUIET)
    trainer.fit(built(case.description, seed=0), Images(case).loader())
    assert trainer.callback_metrics["train_loss"].isfinite()


def test_a_component_without_a_model_fails_and_says_what_to_add() -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"add a small one that describes it, \{type: NewModel, \.\.\.\}, to MODEL"
    ):
        case_of("NewModel")
