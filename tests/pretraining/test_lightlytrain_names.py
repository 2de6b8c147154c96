"""What a script written for LightlyTrain 0.18 holds: every name and default of theirs is ours, or answered.

lightlytrain_0_18.json has the arguments of their functions, and of each method its arguments, views and optimizers, with defaults.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import widefield
from tests.pretraining.test_lightlytrain_page import PAGE, THEIRS
from tests.pretraining.tiny import TinyWrapper
from widefield.cli import main
from widefield.cli.lookup import _argument_docs
from widefield.components.metrics import METRICS
from widefield.config.check import describe
from widefield.pretraining.arguments import Settings, parse
from widefield.pretraining.callbacks import CallbackArgs, CheckpointArgs, make_callbacks
from widefield.pretraining.checkpoint import load_checkpoint
from widefield.pretraining.embedding import EmbeddingModel, checkpoint_blocks
from widefield.pretraining.methods import METHODS, RULE
from widefield.pretraining.methods.base import Run
from widefield.pretraining.methods.dino import ScaledRows
from widefield.pretraining.out import OutFolder
from widefield.pretraining.settings import Errors, values_for
from widefield.pretraining.transform_args import Normalize
from widefield.pretraining.wrapping import has_batch_norm, wrap
from widefield.registry import MODELS, arguments_of, import_object, outline

DIFFERENT = {
    "pretrain.method",
    "dino.optim_args.lars.momentum",
    "dino.optim_args.lars.weight_decay",
    "dinov2.ibot_separate_head",
    "dinov2.output_dim",
    "dinov2.student_freeze_last_layer_steps",
    "dinov2.momentum_start",
    "dinov2.teacher_temp_start",
    "dinov2.teacher_temp_warmup_steps",
    "dinov2.transform_args.local_view.view_size",
    "dinov2.optim_args.sgd.lr",
    "dinov2.optim_args.lars.momentum",
    "dinov2.optim_args.lars.weight_decay",
    "distillation.teacher",
    "distillation.optim_args.adamw.weight_decay",
    "distillation.optim_args.sgd.lr",
    "simclr.optim_args.lars.momentum",
    "simclr.optim_args.lars.weight_decay",
}
"""Defaults that are not theirs. The page names each of them."""


def settings(find: Callable[[str], Any] = import_object, **options: Any) -> Settings:
    train = find("widefield.pretraining.training:train")
    defaults = {name: one.default for name, one in arguments_of(train).named.items()}
    return parse(train, {**defaults, "out": "out", "data": "data", "model": "timm/resnet10t", **options}, find)


def differences(path: str, ours: Any, theirs: Any) -> Iterator[str]:
    """The paths where a default is another; an AttributeError says which name is missing."""
    if isinstance(theirs, dict) and is_dataclass(ours):
        fixed, also_called = getattr(ours, "fixed", {}), getattr(ours, "also_called", {})
        for name, value in theirs.items():
            known = fixed[name][0] if name in fixed else getattr(ours, also_called.get(name, name))
            yield from differences(f"{path}.{name}", known, value)
        return
    plain = list(ours) if isinstance(ours, tuple) else "required" if ours is inspect.Parameter.empty else ours
    if theirs not in (plain, [plain, plain]):
        yield path


def test_every_name_of_theirs_is_known_and_every_other_default_is_listed() -> None:
    found = []
    for function, arguments in THEIRS["functions"].items():
        parameters = inspect.signature(getattr(widefield, function)).parameters
        for name, default in arguments.items():
            found += differences(f"{function}.{name}", parameters[name].default, default)
    for name, parts in THEIRS["methods"].items():
        method = METHODS.get(name)
        known = arguments_of(method).named
        for argument, default in parts["method_args"].items():
            ours: Any = getattr(method.optim, argument) if argument in RULE else None
            if argument in method.fixed:
                ours = method.fixed[argument][0]
            elif argument not in RULE:
                one = known[method.also_called.get(argument, argument)]
                ours = inspect.Parameter.empty if one.required else one.default
            found += differences(f"{name}.{argument}", ours, default)
        found += differences(f"{name}.transform_args", method.transforms, parts["transform_args"])
        for optim, values in parts["optim_args"].items():
            found += differences(f"{name}.optim_args.{optim}", method.optim.named(optim), values)
    assert set(found) == DIFFERENT
    defaults = PAGE.split("## Defaults that differ")[1].split("##")[0]
    for path in DIFFERENT:
        assert f"`{path.split('.')[0]}`" in defaults and f"`{path.rpartition('.')[2]}`" in defaults, path


def test_their_defaults_given_by_hand_are_taken_wherever_they_are_ours() -> None:
    for name, parts in THEIRS["methods"].items():
        left_out = {path.split(".")[1] for path in DIFFERENT if path.startswith(f"{name}.") and path.count(".") == 1}
        method_args = {key: value for key, value in parts["method_args"].items() if key not in left_out}
        if name == "distillation":
            method_args["teacher"] = TinyWrapper()
        loggers = {"jsonl": THEIRS["loggers"]["jsonl"]}
        options = {"transform_args": parts["transform_args"], "callbacks": THEIRS["callbacks"], "loggers": loggers}
        made = settings(method=name, method_args=method_args, **options)
        assert (made.transforms.channels, made.callbacks.model_checkpoint.save_last) == (3, True)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform_args": {"gaussian_blur": {"blur_limit": 7}}}, r"gaussian_blur\.blur_limit=7; how far .* `sigmas`"),
        ({"transform_args": {"random_grayscale": 0.1, "random_gray_scale": 0.2}}, "is random_gray_scale under another"),
        ({"callbacks": {"model_checkpoint": {"dirpath": "x"}}}, r"dirpath='x'; checkpoints lie in the folder"),
        ({"callbacks": {"model_checkpoint": {"save_weights_only": True}}}, "exported_last.pt has the weights alone"),
        ({"loader_args": {"shuffle": False}}, r"loader_args\.shuffle=False; training batches are shuffled"),
        ({"method": "dino", "method_args": {"warmup_teacher_temp_epochs": 3}}, "give warmup_teacher_temp_steps"),
        ({"method": "dinov2", "method_args": {"ibot_bottleneck_dim": 64}}, "bottleneck_dim is that of both heads"),
        ({"method": "dino", "method_args": {"momentum_start": "low"}}, "method_args.momentum_start: got 'low'"),
        (
            {"method": "distillationv2"},
            r"method='distillationv2' is not here; the nearest is distillation, which compares",
        ),
        ({"method": "dinov31"}, r"method='dinov31' is not here; the nearest is dinov3 with a checkpoint"),
        ({"method": "simlcr"}, "did you mean simclr?"),
        (
            {"trainer_args": {"max_step": 1}, "loader_args": {"prefetch": 1}},
            "mean max_steps .*\n.*mean prefetch_factor",
        ),
        (
            {"batch_size": 0, "optim": "adamw", "optim_args": {"bettas": 1}},
            "got 0, expected int, .*\n.*did you mean betas",
        ),
        ({"method": "dinov3", "method_args": {"gram_wait": 1, "teacher_temp": "hot"}}, "mean gram_w.*\n.*got 'hot'"),
        ({"loggers": {"jsonl": {"flush": 1}}, "streaming": {"tiles": 1}}, "loggers.jsonl.flush: .*\n.*mean tile_size?"),
        ({"resume": False, "resume_interrupted": True}, "resume=False and resume_interrupted=True"),
        ({"activation_checkpoint_args": {"every_n_blocks": 0}}, "every_n_blocks: got 0, expected int, at least 1"),
    ],
)
def test_what_is_not_here_is_answered_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as late:
        settings(**options)
    with pytest.raises(ValueError) as early:  # before torch is imported
        settings(outline, **options)
    assert str(early.value) == str(late.value)


def test_outlines_take_what_the_classes_themselves_take() -> None:
    for name in METHODS.index:
        known = arguments_of(METHODS.get(name)).named.values()
        needed = {one.name: "timm/resnet10t" for one in known if one.required and one.name not in ("embedding", "run")}
        options = {"method": name, "method_args": needed, "optim": "adamw", "trainer_args": {"max_steps": 3}}
        assert settings(outline, **options).as_yaml() == settings(**options).as_yaml()


def test_the_outline_of_a_component_has_the_help_of_the_component_itself() -> None:
    def shown(component: Any) -> list[Any]:
        arguments = arguments_of(component)
        docs = [(_argument_docs(one.owner).get(one.name), describe(one.annotation)) for one in arguments.named.values()]
        defaults = [(one.name, str(one.default)) for one in arguments.named.values()]
        return [component.__module__, component.__qualname__, component.__doc__, arguments.open, docs, defaults]

    for entry in (*METHODS.index.values(), *MODELS.index.values(), *METRICS.index.values()):
        assert shown(outline(entry.target)) == shown(import_object(entry.target))


def test_their_names_have_their_meaning() -> None:
    made = settings(
        method="distillationv3",
        method_args={
            "teacher": "timm/resnet10t",
            "loss_local_weight": 0.5,
            "reference_batch_size": 512,
            "lr_scale_method": "linear",
        },
        transform_args={"random_grayscale": 0.125, "random_rotation": {"degrees": (10, 20)}},
        callbacks={"model_checkpoint": {"train_time_interval": timedelta(hours=1)}},
        loader_args={"shuffle": True, "drop_last": True},
        optim_args={"weight_decay": "auto"},
        resume=True,
    )
    assert made.given.method == "distillation" and made.given.resume_interrupted
    assert made.method_args == {"teacher": "timm/resnet10t", "loss_local_weight": 0.5}
    assert made.rule.scaled(1.0, 1024) == 2.0 and made.transforms.random_gray_scale == 0.125
    assert "reference_batch_size: 512" in made.as_yaml() and "train_time_interval: '1:00:00'" in made.as_yaml()


def dino(**options: Any) -> Any:
    sizes = {"hidden_dim": 16, "bottleneck_dim": 8, "output_dim": 32}
    return METHODS.get("dino")(EmbeddingModel(TinyWrapper()), Run(12, 100, 4, 100), **sizes, **options)


def test_dinos_schedules_go_from_their_start_to_their_end() -> None:
    method = dino(momentum_start=0.5, momentum_end=0.9, weight_decay_start=0.1, weight_decay_end=0.3, warmup_steps=4)
    assert [method.momentum_at(step) for step in (0, 50, 100)] == pytest.approx([0.5, 0.7, 0.9])
    assert [method.weight_decay(0.04, step) for step in (0, 50, 100)] == pytest.approx([0.1, 0.2, 0.3])
    assert method.weight_decay(0.0, 50) == 0 and method.warmup_steps(10) == 4 and dino().warmup_steps(10) == 10
    assert dino(student_freeze_last_layer_steps=50).head.freeze_last_layer == 50


def test_the_rows_of_dinos_last_layer_train_their_length_without_norm_last_layer() -> None:
    head = dino(norm_last_layer=False).head
    assert isinstance(head.last_layer, ScaledRows)
    x = torch.rand(2, 8)
    with torch.no_grad():
        head.last_layer.gain.mul_(3)
    torch.testing.assert_close(head.last_layer(x), 3 * x @ nn.functional.normalize(head.last_layer.weight, dim=1).T)


def test_distillation_takes_little_weight_decay_for_convolutions_with_batch_norm() -> None:
    method = METHODS.get("distillation")
    optim, vit = method.optim.choices[0], wrap("timm/vit_tiny_patch16_224", {"depth": 1})
    assert method.optim_for(optim, TinyWrapper()).weight_decay == 1e-6
    assert method.optim_for(optim, vit) == optim and not has_batch_norm(vit)
    told = TinyWrapper()
    told.architecture_info = lambda: {"model_type": "hybrid", "norm_type": "batchnorm"}  # type: ignore[assignment]
    assert not has_batch_norm(told)


def test_a_teacher_sees_images_normalised_as_its_own_configuration_says() -> None:
    teacher = TinyWrapper(dim=10)
    teacher.model.pretrained_cfg = {"mean": (0.5, 0.25, 0.5), "std": (0.5, 0.5, 0.25)}  # type: ignore[assignment]
    normalize = Normalize((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    method = METHODS.get("distillation")(
        EmbeddingModel(TinyWrapper()), Run(12, 100, 4, 100, normalize), teacher=teacher
    )
    images, seen = torch.rand(1, 3, 8, 8), []
    teacher.forward_features = lambda x: (seen.append(x), TinyWrapper.forward_features(teacher, x))[1]  # type: ignore[method-assign]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (normalize.mean, normalize.std))
    method.loss([(images - mean) / std], 0)
    wanted = (images - torch.tensor([0.5, 0.25, 0.5]).view(3, 1, 1)) / torch.tensor([0.5, 0.5, 0.25]).view(3, 1, 1)
    torch.testing.assert_close(seen[0], wanted)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("dinov3/vitb16", "timm/vit_base_patch16_dinov3"),
        ("dinov3/vith16plus", "timm/vit_huge_plus_patch16_dinov3"),
        ("dinov3/convnext-tiny", "timm/convnext_tiny.dinov3_lvd1689m"),
        ("dinov2/vitl14", "timm/vit_large_patch14_reg4_dinov2"),
        ("dinov2/vitb14-noreg", "timm/vit_base_patch14_dinov2"),
    ],
)
def test_a_model_under_their_name_is_told_where_its_weights_come_from(name: str, found: str) -> None:
    assert timm.is_model(found.removeprefix("timm/"))
    with pytest.raises(ValueError, match=f"{name!r} is a name of LightlyTrain; the model is {found}, whose weights"):
        METHODS.get("distillation")(EmbeddingModel(TinyWrapper()), Run(12, 100, 4, 100), teacher=name)
    with pytest.raises(ValueError, match="it is not here: make the model with its own package"):
        wrap("ultralytics/yolov8s")


def test_a_checkpoint_with_another_head_is_taken(tmp_path: Path) -> None:
    given, wrapper = TinyWrapper(seed=1), TinyWrapper(seed=2)
    own = wrapper.model[5].weight.clone()
    state = given.model.state_dict()
    del state["5.weight"], state["5.bias"]
    torch.save({**state, "head.norm.weight": torch.ones(3), "head.fc.weight": torch.ones(2, 3)}, tmp_path / "a.pt")
    load_checkpoint(wrapper, tmp_path / "a.pt")
    assert torch.equal(wrapper.model[0].weight, given.model[0].weight) and torch.equal(wrapper.model[5].weight, own)
    torch.save({**state, "6.weight": torch.ones(3, 3, 3, 3)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt is not of this model: .* it has, unlike the network, 6\.weight"):
        load_checkpoint(wrapper, tmp_path / "b.pt")


def test_adamw_of_8_bits_has_the_methods_values(monkeypatch: pytest.MonkeyPatch) -> None:
    optim = METHODS.get("dino").optim.named("adamw8bit")
    assert (optim.lr, optim.weight_decay) == (5e-4, 0.04)
    made: dict[str, Any] = {}
    module = ModuleType("bitsandbytes.optim")
    module.AdamW8bit = lambda groups, **options: made.update(options, groups=groups)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    optim.make([{"params": []}], 0.5, fused=True)
    assert made == {"groups": [{"params": []}], "lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.04}
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"pip install 'widefield\[adamw8bit\]'"):
        optim.make([], 0.5)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    model = wrap("timm/vit_tiny_patch16_224", {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32}).get_model()
    images = torch.rand(2, 3, 32, 32)

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(images).sum(), list(model.parameters())))

    before, calls = gradients(), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append("0"))  # of each call of forward
    checkpoint_blocks(model, 1)
    model.blocks[1].attn.register_forward_hook(lambda *_: calls.append("1"))
    after = gradients()
    assert calls == ["0", "1", "1"], "the second block was computed again"
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="activation_checkpoint_args are for vision transformers"):
        checkpoint_blocks(TinyWrapper().get_model(), 1)


def test_a_member_of_an_enumeration_is_its_text() -> None:
    errors = Errors()
    given = values_for(
        widefield.export, {"out": "a", "checkpoint": "b", "part": widefield.ModelPart.MODEL}, "x", errors
    )
    assert type(given["part"]) is str and given["part"] == "model" and not errors
    theirs = ["package_default", "torch_model", "torch_state_dict", "safetensors"]
    assert [*widefield.ModelFormat] == [*theirs, "onnx", "torch_export"]
    assert [*widefield.EmbeddingFormat] == ["torch", "csv", "lightly_csv", "parquet"]


def test_help_shows_the_arguments_of_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "dino"]) == 0
    shown = capsys.readouterr().out
    assert "momentum_start: a number, from 0 to 1 or 'auto' (default auto)" in shown and "embedding:" not in shown


@pytest.mark.parametrize(
    ("given", "epochs", "steps"),
    [({}, 1, 0), ({"every_n_epochs": 0}, 0, 0), ({"every_n_epochs": 3}, 3, 0), ({"every_n_train_steps": 5}, 0, 5)],
)
def test_0_epochs_between_checkpoints_are_not_1(given: dict[str, int], epochs: int, steps: int, tmp_path: Path) -> None:
    made = make_callbacks(CallbackArgs(model_checkpoint=CheckpointArgs(**given)), OutFolder(tmp_path), False, None)
    saver = next(one for one in made if isinstance(one, ModelCheckpoint))
    assert (saver._every_n_epochs, saver._every_n_train_steps) == (epochs, steps)


def test_a_spacing_of_0_is_no_level(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="spacing=0 must be above 0"):
        widefield.embed(tmp_path / "x", tmp_path, tmp_path / "last.ckpt", image_size=None, spacing=0)
