"""`widefield config convert`: configurations of MMPretrain as ours. Some 10 CPU seconds."""

import pprint
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tests.cli.mmpretrain_configs import CLASSIFIERS, REPLACED, SELF_SUPERVISED
from tests.small_images import write_folder
from widefield.cli import main
from widefield.cli.fit_sections import SECTIONS
from widefield.cli.mmpretrain import data, models, runs
from widefield.cli.mmpretrain.convert import convert
from widefield.config import Config, ConfigError, check_config
from widefield.config.mmengine_files import read_mmengine
from widefield.modules.optimization import make_optimizer, make_schedule

RUNTIME = """
default_scope = 'mmpretrain'
env_cfg = dict(cudnn_benchmark=False, dist_cfg=dict(backend='nccl'))
log_level = 'INFO'
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='UniversalVisualizer', vis_backends=vis_backends)
default_hooks = dict(logger=dict(type='LoggerHook', interval=100), checkpoint=dict(type='CheckpointHook', interval=1))
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
"""
IMAGES = """
dataset_type = 'ImageNet'
data_preprocessor = dict(num_classes=1000, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
bgr_mean = data_preprocessor['mean'][::-1]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='RandAugment', policies='timm_increasing', num_policies=2, total_level=10, magnitude_level=9,
         magnitude_std=0.5, hparams=dict(pad_val=[round(x) for x in bgr_mean], interpolation='bicubic')),
    dict(type='ColorJitter', brightness=0.4, contrast=0.4, saturation=0.4),
    dict(type='RandomErasing', erase_prob=0.25, mode='rand', min_area_ratio=0.02, max_area_ratio=1 / 3,
         fill_color=bgr_mean, fill_std=data_preprocessor['std'][::-1]),
    dict(type='PackInputs')]
test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='ResizeEdge', scale=256, edge='short'),
    dict(type='CenterCrop', crop_size=224), dict(type='PackInputs')]
train_dataloader = dict(batch_size=64, num_workers=5, dataset=dict(
    type=dataset_type, data_root='imagenet', split='train', pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True))
val_dataloader = dict(batch_size=64, num_workers=5, dataset=dict(
    type=dataset_type, data_root='imagenet', split='val', pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False))
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
val_cfg = dict()
"""
WARM = "dict(type='LinearLR', start_factor=1e-3, begin=0, end=20, convert_to_iter_based=True)"
COSINE = "dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=20)"
RECIPES = {
    "step": """
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.0001))
param_scheduler = dict(type='MultiStepLR', by_epoch=True, milestones=[30, 60, 90], gamma=0.1)""",
    "iterations": """
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.8, momentum=0.9, weight_decay=5e-5, nesterov=True))
param_scheduler = [dict(type='LinearLR', start_factor=0.25, by_epoch=False, begin=0, end=2500),
                   dict(type='MultiStepLR', by_epoch=True, milestones=[30, 60, 90], gamma=0.1)]""",
    "decay": """
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.045, momentum=0.9, weight_decay=0.00004))
param_scheduler = dict(type='StepLR', by_epoch=True, step_size=1, gamma=0.98)""",
    "lamb": f"""
optim_wrapper = dict(optimizer=dict(type='Lamb', lr=0.008, weight_decay=0.01),
                     paramwise_cfg=dict(bias_decay_mult=0., norm_decay_mult=0.))
param_scheduler = [{WARM}, {COSINE}]""",
    "swin": f"""
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=5e-4 * 1024 / 512, weight_decay=0.05, betas=(0.9, 0.999)),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=5.0))
param_scheduler = [{WARM}, {COSINE}]
custom_hooks = [dict(type='EMAHook', momentum=4e-5, priority='ABOVE_NORMAL')]
model = dict(train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))""",
    "vit": f"""
optim_wrapper = dict(type='AmpOptimWrapper', optimizer=dict(type='AdamW', lr=0.003, weight_decay=0.3),
    paramwise_cfg=dict(bias_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0))
param_scheduler = [{WARM}, {COSINE}]""",
    "layers": f"""
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    constructor='LearningRateDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.65, norm_decay_mult=0.0))
param_scheduler = [{WARM}, {COSINE}]""",
}
BUILT = {
    "resnet/resnet18_8xb32_in1k", "resnet/resnet18_8xb16_cifar10", "mobilenet_v2/mobilenet-v2_8xb32_in1k",
    "convnext_v2/convnext-v2-atto_32xb32_in1k", "efficientnet/efficientnet-b0_8xb32_in1k", "deit/deit-tiny_4xb256_in1k",
}  # fmt: skip
"""Those that are built without weights, for each takes some time."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("configs")
    (folder / "_base_").mkdir()
    (folder / "_base_" / "images.py").write_text(IMAGES)
    (folder / "_base_" / "runtime.py").write_text(RUNTIME)
    for name, text in RECIPES.items():
        (folder / "_base_" / f"{name}.py").write_text(
            f"{text}\ntrain_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)"
        )
    return folder


def write(folder: Path, model: dict[str, Any], recipe: str, more: str = "") -> Path:
    file = folder / "child.py"
    bases = [f"_base_/{name}.py" for name in ("images", recipe, "runtime")]
    file.write_text(f"_base_ = {bases}\nmodel = {pprint.pformat(model)}\n{more}")
    return file


@pytest.mark.parametrize("row", CLASSIFIERS, ids=lambda row: row[0])
def test_real_classifiers_convert_to_configurations_that_pass_the_check(folder: Path, row: Any) -> None:
    name, backbone, neck, head, recipe = row
    found = convert(
        write(folder, {"type": "ImageClassifier", "backbone": backbone, "neck": neck, "head": head}, recipe)
    )
    assert found.problems == ()
    model = found.data["model"]
    assert model["backbone"]["type"] == backbone["type"] and model["head"]["in_channels"] == head["in_channels"]
    assert [one["type"] for one in found.data["data"]["train"]["transforms"]] == [
        *("RGB", "RandomResizedCrop", "RandomHorizontalFlip", "TimmRandAugment", "ColorJitter", "RandomNoiseErasing"),
    ]
    assert found.data["trainer"]["max_epochs"] == 100
    if name in BUILT:
        with torch.device("meta"):
            made = nn.ModuleDict({part: models_built(model[part]) for part in ("backbone", "head")})
        assert sum(one.numel() for one in made.parameters()) > 5e5


def models_built(description: dict[str, Any]) -> nn.Module:
    from widefield.registry import MODELS

    built: nn.Module = MODELS.build(description)
    return built


@pytest.mark.parametrize(("name", "model"), SELF_SUPERVISED, ids=[name for name, _ in SELF_SUPERVISED])
def test_real_pretraining_converts_to_configurations_that_pass_the_check(
    folder: Path, name: str, model: dict[str, Any]
) -> None:
    more = "data_preprocessor = dict(_delete_=True, type='SelfSupDataPreprocessor', mean=[123.675, 116.28, 103.53], "
    more += "std=[58.395, 57.12, 57.375], to_rgb=True)"
    found = convert(write(folder, model, "step", more))
    assert found.problems == ()
    assert found.data["model"]["data_preprocessor"]["type"] == "SelfSupDataPreprocessor"


@pytest.mark.parametrize(("backbone", "name", "options"), REPLACED, ids=[name for _, name, _ in REPLACED])
def test_a_backbone_that_is_not_here_names_the_network_of_timm(
    backbone: dict[str, Any], name: str, options: dict[str, Any]
) -> None:
    assert models.replacement(backbone) == (name, options)


def test_a_backbone_without_a_counterpart_names_none() -> None:
    assert models.replacement({"type": "HorNet", "arch": "tiny"}) is None
    assert models.replacement({"type": "RepVGG", "arch": "B1g2"}) is None


def test_timm_takes_the_place_of_backbone_neck_and_head_when_asked(folder: Path) -> None:
    backbone = {"type": "LeViT", "arch": "128s", "img_size": 224, "drop_path_rate": 0.1}
    head = {"type": "LeViTClsHead", "num_classes": 7, "in_channels": 384, "distillation": True, "topk": (1, 5)}
    file = write(
        folder,
        {"type": "ImageClassifier", "backbone": backbone, "neck": {"type": "HRFuseScales"}, "head": head},
        "swin",
    )
    asked = convert(file)
    assert asked.takes_place == "levit_128s" and len(asked.problems) == 3
    found = convert(file, timm=True)
    assert found.problems == ()
    assert found.data["model"]["backbone"] == {
        "type": "TimmBackbone", "name": "levit_128s", "global_pool": True, "options": {"drop_path_rate": 0.1},
    }  # fmt: skip
    assert found.data["model"]["head"] | {"loss": 0} == {
        "type": "LinearClsHead", "num_classes": 7, "in_channels": 384, "loss": 0, "topk": [1, 5],
    }  # fmt: skip
    assert "neck" not in found.data["model"]


def test_hooks_and_wrappers_become_settings_of_the_trainer(folder: Path) -> None:
    _, backbone, neck, head, _ = CLASSIFIERS[0]
    model = {"type": "ImageClassifier", "backbone": backbone, "neck": neck, "head": head}
    more = """
optim_wrapper = dict(type='AmpOptimWrapper', accumulative_counts=4,
    paramwise_cfg=dict(custom_keys={'head': dict(lr_mult=10), '.ln': dict(decay_mult=0), 'none': dict(lr_mult=2)}))
randomness = dict(seed=3)"""
    found = convert(write(folder, model, "swin", more))
    made = found.data
    assert made["trainer"] == {
        "max_epochs": 100, "precision": "16-mixed", "accumulate_grad_batches": 4, "gradient_clip_val": 5.0,
        "log_every_n_steps": 100,
        "callbacks": [{"type": "EMAWeightAveraging", "decay": 1 - 4e-5, "use_buffers": False}],
    }  # fmt: skip
    assert made["optimizer"]["lr"] == 1e-3
    assert made["paramwise_cfg"]["custom_keys"] == {"head": {"lr_mult": 10.0}}
    assert len(found.notes) == 1 and "custom_keys.none: it is in no parameter's name" in found.notes[0]
    assert made["model"]["train_cfg"]["augments"][0] == {"type": "Mixup", "alpha": 0.8}
    assert made["seed_everything"] == 3


def rates(schedules: Any, epochs: int, steps: int) -> list[float]:
    old = {
        "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 1.0}},
        "param_scheduler": schedules,
        "train_cfg": {"max_epochs": epochs},
    }
    made = runs.optimization(old, {}, [])
    optimizer = make_optimizer(made["optimizer"], nn.Linear(1, 1))
    schedule, interval = make_schedule(made["lr_scheduler"], optimizer, steps)
    found = []
    for _ in range(epochs * (steps if interval == "step" else 1)):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found[:: steps if interval == "step" else 1]


FROM_2 = {"type": "CosineAnnealingLR", "begin": 2}
WARM_UP = {"type": "LinearLR", "start_factor": 0.1, "begin": 0, "end": 2}


@pytest.mark.parametrize(
    ("schedules", "expected"),
    [
        ([WARM_UP, {"type": "MultiStepLR", "milestones": [3, 5]}], [0.1, 0.55, 1, 0.1, 0.1, 0.01]),
        ([WARM_UP, {"type": "StepLR", "step_size": 3}], [0.1, 0.55, 1, 0.1, 0.1, 0.1]),
        ([{**WARM_UP, "convert_to_iter_based": True}, FROM_2], [0.1, 0.55, 1, 0.854, 0.5, 0.146]),
        ([{"type": "LinearLR", "start_factor": 0.1}, FROM_2], [0.1, 0.55, 1, 0.854, 0.5, 0.146]),
        ([{"type": "CosineAnnealingLR", "T_max": 2, "eta_min": 0.2}], [1, 0.6, 0.2, 0.2, 0.2, 0.2]),
        (
            [
                {"type": "CosineAnnealingLR", "T_max": 2, "eta_min": 0.2, "end": 2},
                {"type": "ConstantLR", "factor": 0.5, "begin": 2, "end": 6},
            ],
            [1, 0.6, 0.1, 0.1, 0.1, 0.1],
        ),
        (
            [
                {"type": "ConstantLR", "factor": 0.1, "by_epoch": False, "begin": 0, "end": 4},
                {"type": "PolyLR", "by_epoch": False, "begin": 4},
            ],
            [0.1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6],
        ),
        (WARM_UP, [0.1, 0.55, 1, 1, 1, 1]),
    ],
)  # fmt: skip
def test_learning_rates_are_those_of_theirs(schedules: Any, expected: list[float]) -> None:
    assert rates(schedules, 6, 4) == pytest.approx(expected, abs=1e-3)


_ERASED = {"p": 0.2, "scale": [0.02, 0.4], "ratio": [0.3, 10 / 3], "mean": [3, 2, 1], "std": [0, 0, 0]}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ({"type": "Resize", "scale": (60, 40), "backend": "pillow"}, [{"type": "Resize", "size": [40, 60]}]),
        (
            {"type": "ResizeEdge", "scale": 32, "interpolation": "bicubic"},
            [{"type": "Resize", "size": 32, "interpolation": "bicubic", "antialias": False}],
        ),
        (
            {"type": "EfficientNetCenterCrop", "crop_size": 224, "backend": "pillow"},
            [{"type": "Resize", "size": 256, "interpolation": "bicubic"}, {"type": "CenterCrop", "size": 224}],
        ),
        ({"type": "mmpretrain.RandomFlip", "direction": "vertical"}, [{"type": "RandomVerticalFlip", "p": 0.5}]),
        ({"type": "RandomGrayscale", "prob": 0.2, "keep_channels": True}, [{"type": "RandomGrayscale", "p": 0.2}]),
        ({"type": "Solarize", "thr": 128, "prob": 0.2}, [{"type": "RandomSolarize", "threshold": 128, "p": 0.2}]),
        (
            {"type": "torchvision/RandomCrop", "size": 32, "padding": 4},
            [{"type": "RandomCrop", "size": 32, "padding": 4}],
        ),
        (
            {"type": "AutoAugment", "policies": "imagenet", "hparams": {"pad_val": [104, 116, 124]}},
            [{"type": "AutoAugment", "policy": "IMAGENET", "interpolation": "nearest", "fill": [124, 116, 104]}],
        ),
        (
            {"type": "RandomErasing", "erase_prob": 0.2, "fill_color": [1, 2, 3]},
            [{"type": "RandomNoiseErasing", **_ERASED}],
        ),
        (
            {"type": "GaussianBlur", "magnitude_range": [0.1, 2.0], "magnitude_std": "inf", "prob": 0.1},
            [
                {
                    "type": "RandomApply",
                    "transforms": [{"type": "GaussianBlur", "kernel_size": 17, "sigma": [0.1, 2.0]}],
                    "p": 0.1,
                }
            ],
        ),
    ],
)
def test_steps_of_a_pipeline_become_transforms(step: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    notes: list[Any] = []
    assert data.pipeline([step], ("pipeline",), notes) == expected
    assert notes == []
    dataset = {"type": "ImageFolder", "root": "x", "transforms": expected}
    check_config(Config({"data": {"type": "Datasets", "train": dataset}}), SECTIONS)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("train_cfg = dict(val_begin=3)", "train_cfg.val_begin: 3 was left out: there is nothing of the kind here"),
        ("custom_hooks = [dict(type='PreciseBNHook')]", "custom_hooks.0.type: PreciseBNHook is not here; write it as"),
        (
            "optim_wrapper = dict(clip_grad=dict(max_norm=1., norm_type=1))",
            "optim_wrapper.clip_grad.norm_type: gradients",
        ),
        (
            "val_evaluator = dict(_delete_=True, type='Mine')\ntest_evaluator = val_evaluator",
            "val_evaluator.type: Mine is not here; it was left out",
        ),
        ("data_preprocessor = dict(to_rgb=False)", "data_preprocessor.to_rgb: their images are in the order of BGR"),
        ("optim_wraper = dict()", "optim_wraper: MMPretrain does not read it; did you mean optim_wrapper?"),
        ("lr_config = dict()", "lr_config: a key of MMClassification 0.x, which is not read"),
        ("resume = True", "resume: a run in its folder goes on with"),
        (
            "train_dataloader = dict(sampler=dict(type='RepeatAugSampler'))",
            "train_dataloader.sampler.type: RepeatAugSampler is not",
        ),
        ("optimizer = make(3)", "`optimizer = make(3)` was left out: make() would have to be run"),
        ("import os\nos.remove('x')", "`os.remove('x')` was left out: os.remove() would have to be run"),
        ("big = [0] * 10 ** 9", "was left out"),
    ],
)
def test_what_is_not_the_same_is_listed_with_its_line(folder: Path, more: str, line: str) -> None:
    row = CLASSIFIERS[0]
    file = write(
        folder, {"type": "ImageClassifier", "backbone": {"type": "ResNet", "depth": 18}, "head": row[3]}, "step", more
    )
    notes = convert(file).notes
    assert len(notes) == 1 and line in notes[0]
    assert f"{file}, line " in notes[0]


def test_both_styles_of_files_are_read_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", "/data")
    (tmp_path / "base.py").write_text(
        "model = dict(type='A', part=dict(x=1, y=2))\nsteps = [dict(type='B', p=0.5)]\nrate = 0.1"
    )
    (tmp_path / "old.py").write_text(
        "_base_ = 'base.py'\nmodel = dict(part=dict(_delete_=True, z=3), more={{_base_.steps}})\n"
        "root = '{{$DATA:none}}/{{fileBasenameNoExtension}}'\nsize = 2 ** 3 if len(_base_.steps) == 1 else None\n"
        "pads = [round(x) for x in (1.6, 2.4)][::-1]\nmodel['name'] = f'net{size}'\n_base_.steps[0].p = 0.1\n"
    )
    (tmp_path / "new.py").write_text(
        "from mmengine.config import read_base\nfrom mmpretrain.models import A, B\nwith read_base():\n    from .base import *\n"
        "model.update(dict(type=A, part=dict(z=3), more=[dict(type=B, p=0.5)], name='net8'))\nsteps[0]['p'] *= 0.2\n"
        "root = '{{$NONE:/data}}/' + 'old'\nsize, pads = 8, [2, 2]\n"
    )
    found = [read_mmengine(tmp_path / name) for name in ("old.py", "new.py")]
    expected = {
        "model": {"type": "A", "part": {"z": 3}, "more": [{"type": "B", "p": 0.5}], "name": "net8"},
        "steps": [{"type": "B", "p": 0.1}], "rate": 0.1, "root": "/data/old", "size": 8, "pads": [2, 2],
    }  # fmt: skip
    assert [(config.data, notes) for config, notes in found] == [(expected, []), (expected, [])]
    assert str(found[0][0].origin(("rate",))) == f"{tmp_path / 'base.py'}, line 3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "line 1"),
        ("_base_ = 'old.py'", "circle"),
        ("_base_ = 'mmdet::a.py'", "lies in a package; copy it"),
        ("_base_ = ['a.py', 'b.py']", "several bases have the key x"),
        ("_base_ = 'a.py'\nx = dict(y=1)", "x is a dictionary over 1"),
        ("x = '{{$NOT_THERE}}'", "no variable NOT_THERE"),
        ("x = 1", "describes no model"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, text: str, message: str) -> None:
    for name in "ab":
        (tmp_path / f"{name}.py").write_text("x = 1")
    (tmp_path / "old.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "old.py")


def test_a_converted_configuration_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for phase in ("train", "val"):
        write_folder(tmp_path / "images" / phase, count=1, side=32)
    (tmp_path / "old.py").write_text(f"""
model = dict(type='ImageClassifier', backbone=dict(type='ResNet', depth=18, stem_channels=4, base_channels=4, num_stages=2,
             out_indices=(1,)), neck=dict(type='GlobalAveragePooling'),
             head=dict(type='LinearClsHead', num_classes=2, in_channels=8, loss=dict(type='CrossEntropyLoss')))
data_preprocessor = dict(num_classes=2, mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], to_rgb=True)
pipeline = [dict(type='LoadImageFromFile'), dict(type='RandomResizedCrop', scale=32), dict(type='PackInputs')]
train_dataloader = dict(batch_size=1, dataset=dict(
    type='CustomDataset', data_root=r'{tmp_path / "images"}', data_prefix='train', pipeline=pipeline))
val_dataloader = dict(batch_size=1, dataset=dict(type='CustomDataset', data_root=r'{tmp_path / "images"}', data_prefix='val'))
val_evaluator = dict(type='Accuracy')
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(max_epochs=1)
log_level = 'INFO'
""")
    new = tmp_path / "new.yaml"
    assert main(["config", "convert", str(tmp_path / "old.py"), "--out", str(new)]) == 0
    assert capsys.readouterr().err == ""
    assert yaml.safe_load(new.read_text())["data"]["val"]["root"] == f"{tmp_path / 'images'}/val"
    assert main(["config", "convert", str(tmp_path / "old.py"), "--out", str(new)]) == 2  # nothing is written over
    assert main(["fit", "--config", str(new), "--out", str(tmp_path / "run"), "trainer.enable_progress_bar=false"]) == 0
    assert "val_accuracy/top1" in (tmp_path / "run" / "history.csv").read_text()
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Learning curves" in report and "ImageClassifier" in report


def test_an_interpolation_that_torchvision_has_not_is_replaced_and_said(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text(
        "model = dict(type='ImageClassifier', backbone=dict(type='ResNet', depth=18), neck=dict(type='GlobalAveragePooling'),\n"
        "    head=dict(type='LinearClsHead', num_classes=2, in_channels=512, loss=dict(type='CrossEntropyLoss')))\n"
        "train_dataloader = dict(batch_size=2, dataset=dict(type='CustomDataset', data_root='d', pipeline=[\n"
        "    dict(type='LoadImageFromFile'), dict(type='RandomResizedCrop', scale=8),\n"
        "    dict(type='AutoAugment', policies='imagenet', hparams=dict(pad_val=[1, 2, 3], interpolation='bicubic')),\n"
        "    dict(type='PackInputs')]))\n"
    )
    found = convert(tmp_path / "old.py")
    augment = found.data["data"]["train"]["transforms"][-1]
    assert (augment["type"], augment["interpolation"]) == ("AutoAugment", "bilinear")
    assert any("bicubic is bilinear here" in note for note in found.notes)


def test_a_checkpoint_to_be_filled_in_keeps_a_configuration_from_being_used(folder: Path) -> None:
    _, backbone, neck, head, recipe = CLASSIFIERS[0]
    backbone = {**backbone, "init_cfg": {"type": "Pretrained", "checkpoint": "", "prefix": "backbone."}}
    model = {"type": "ImageClassifier", "backbone": backbone, "neck": neck, "head": head}
    (problem,) = convert(write(folder, model, recipe)).problems
    assert problem.startswith("model.backbone.init_cfg.checkpoint: got '', expected a file")


def test_the_collection_of_a_retriever_and_the_options_of_a_timm_network_are_translated(folder: Path) -> None:
    encoder = [{"type": "TIMMBackbone", "model_name": "test_vit", "features_only": True, "img_size": 32}]
    collection = {"type": "InShop", "data_root": "shop", "split": "gallery", "pipeline": [{"type": "PackInputs"}]}
    loader = {"batch_size": 4, "num_workers": 2, "dataset": collection, "sampler": {"type": "DefaultSampler"}}
    model = {"type": "ImageToImageRetriever", "image_encoder": encoder, "prototype": loader}
    found = convert(write(folder, model, "step"))
    assert found.problems == ()
    made = found.data["model"]
    assert made["prototype"] == {"dataset": {"type": "ImageFolder", "root": "shop"}, "batch_size": 4, "num_workers": 2}
    assert made["image_encoder"] == [
        {"type": "TimmBackbone", "features_only": True, "name": "test_vit", "options": {"img_size": 32}}
    ]
    assert any("model.prototype.dataset.type: InShop is not here" in note for note in found.notes)


def test_hooks_of_methods_become_arguments(folder: Path) -> None:
    hook = "custom_hooks = [dict(type='SimSiamHook', fix_pred_lr=True, lr=0.05, adjust_by_epoch=False)]\n"
    hook += "optim_wrapper = dict(optimizer=dict(lr=0.1), paramwise_cfg=dict(custom_keys=dict(predictor=dict(fix_lr=True))))"
    neck = {"type": "NonLinearNeck", "in_channels": 512, "hid_channels": 8, "out_channels": 8}
    backbone = {"type": "ResNet", "depth": 18}
    head = {
        "type": "LatentPredictHead",
        "loss": {"type": "CosineSimilarityLoss"},
        "predictor": {**neck, "in_channels": 8},
    }
    model = {"type": "SimSiam", "backbone": backbone, "neck": neck, "head": head}
    found = convert(write(folder, model, "step", hook))
    assert found.data["paramwise_cfg"] == {"custom_keys": {"predictor": {"fix_lr": True, "lr_mult": 0.5}}}
    assert not any("Hook" in note or "fix_lr" in note for note in found.notes)

    hook = "custom_hooks = [dict(type='SwAVHook', batch_size=32, epoch_queue_starts=15, crops_for_assign=[0, 1],"
    hook += " feat_dim=128, queue_length=3850, frozen_layers_cfg=dict(prototypes=5005))]"
    neck = {"type": "SwAVNeck", "in_channels": 512, "hid_channels": 8, "out_channels": 128}
    loss = {"type": "SwAVLoss", "feat_dim": 128, "num_prototypes": 30}
    model = {"type": "SwAV", "backbone": backbone, "neck": neck, "head": {"type": "SwAVHead", "loss": loss}}
    found = convert(write(folder, model, "step", hook))
    made = found.data["model"]
    assert (made["epoch_queue_starts"], made["frozen_layers_cfg"]) == (15, {"prototypes": 5005})
    assert made["head"]["loss"]["queue_length"] == 3840
    assert found.problems == ()


def test_a_base_that_is_not_there_is_no_line_to_leave_out(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text("_base_ = 'gone.py'\nmodel = dict(type='ImageClassifier')")
    with pytest.raises(FileNotFoundError, match=r"gone\.py, which .*child\.py is based on, does not exist"):
        convert(tmp_path / "child.py")


def test_a_file_of_theirs_is_answered_in_a_line() -> None:
    keys = ("train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg")
    with pytest.raises(ConfigError) as error:
        check_config(Config({**{key: {"type": "X"} for key in keys}, "modle": {}}), SECTIONS)
    first, second = str(error.value).splitlines()
    assert first.startswith(
        "train_dataloader: a key of MMPretrain, and so are optim_wrapper, param_scheduler, train_cfg:"
    )
    assert second.startswith("modle: no such key")
