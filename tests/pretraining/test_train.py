"""A run from end to end: what it writes, and what it refuses."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import widefield
from tests.pretraining.tiny import (
    QUIET,
    TinyWrapper,
    assert_same,
    checkpoint,
    exported,
    files,
    losses,
    metrics,
    train,
    write_images,
)
from widefield.modules.runs import NotFiniteError
from widefield.pretraining import METHODS, Method
from widefield.registry import MODELS


def test_a_run_writes_these_files_and_no_others(tmp_path: Path, images: Path) -> None:
    train(tmp_path / "out", images, loggers={"tensorboard": None})
    assert files(tmp_path / "out") == {
        "checkpoints/epoch=0-step=2.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "exported_models/exported_last.pt",
        "metrics.jsonl",
        "train.log",
    }
    content = checkpoint(tmp_path / "out")
    assert content["epoch"] == 0 and content["global_step"] == 2
    weights, about = exported(tmp_path / "out"), content["widefield"]
    assert weights.keys() == TinyWrapper().get_model().state_dict().keys()
    inside = {name: content["state_dict"][about["model"] + name] for name in weights}
    assert_same(dict(weights), inside)
    trained = TinyWrapper()
    trained.get_model().load_state_dict(weights)
    assert not torch.equal(trained.model[0].weight, TinyWrapper().model[0].weight)
    (line,) = (line for line in metrics(tmp_path / "out") if "train_loss" in line)
    assert {"step", "epoch", "images_per_second", "data_wait", "bad_images"} <= line.keys()
    assert any("lr-SGD/params" in line for line in metrics(tmp_path / "out"))
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert "model: TinyWrapper" in text and "method: simclr" in text


@pytest.mark.parametrize("method", [name for name in METHODS.index if not METHODS.get(name).needs_transformer])
def test_every_method_trains_and_a_seed_repeats_it_bit_for_bit(method: str, tmp_path: Path, images: Path) -> None:
    before = TinyWrapper().get_model().state_dict()
    for name in ("a", "b"):
        train(tmp_path / name, images, method, epochs=2, **QUIET)
    weights = exported(tmp_path / "a")
    assert_same(dict(weights), dict(exported(tmp_path / "b")))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert not torch.equal(weights["4.weight"], before["4.weight"])
    assert torch.equal(weights["5.weight"], before["5.weight"]), "no loss reaches it"
    train(tmp_path / "other", images, method, epochs=1, seed=1, **QUIET)
    assert losses(tmp_path / "other")[0] != losses(tmp_path / "a")[0]


def test_workers_change_no_number(tmp_path: Path, images: Path) -> None:
    train(tmp_path / "none", images)
    train(tmp_path / "two", images, num_workers=2)
    assert_same(dict(exported(tmp_path / "none")), dict(exported(tmp_path / "two")))


def test_train_and_pretrain_are_one_function() -> None:
    assert widefield.train is widefield.pretrain


def test_no_epoch_writes_a_checkpoint_and_the_export(tmp_path: Path, images: Path) -> None:
    train(tmp_path, images, epochs=0)
    assert {"checkpoints/last.ckpt", "exported_models/exported_last.pt"} <= files(tmp_path)
    assert_same(dict(exported(tmp_path)), dict(TinyWrapper().get_model().state_dict()))


def test_pictures_of_the_run_are_no_data_of_it(tmp_path: Path) -> None:
    images = write_images(tmp_path / "data")
    train(images / "out", images)
    shutil.copy(images / "00.png", images / "out" / "augmented_views.png")
    train(images / "out", images, epochs=2, resume_interrupted=True)
    assert checkpoint(images / "out")["widefield"]["settings"]["images"] == 10


@pytest.mark.parametrize("limit", [{}, {"max_steps": 20}])
def test_a_tenth_of_the_steps_warms_up_however_many_there_are(
    limit: dict[str, int], tmp_path: Path, images: Path
) -> None:
    steps = limit.get("max_steps", 40)
    options = {"epochs": 20, "trainer_args": {"log_every_n_steps": 1, **limit}, "callbacks": {"quality": None}}
    train(tmp_path, images, optim_args={"lr": 64.0 * 1e-4}, **options)
    rates = [line["lr-SGD/params"] for line in metrics(tmp_path) if "lr-SGD/params" in line]
    assert len(rates) == steps
    assert max(rates) == pytest.approx(1e-4) and abs(rates.index(max(rates)) - steps // 10) <= 1
    assert rates[-1] == pytest.approx(1e-7)


def test_gradients_are_clipped_in_mixed_precision(tmp_path: Path, images: Path) -> None:
    train(tmp_path, images, "dino", precision="bf16-mixed", optim="adamw")
    assert METHODS.get("dino").optim.gradient_clip_val == 3.0 and exported(tmp_path)["0.weight"].dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_views_have_the_type_of_the_weights(precision: str, tmp_path: Path, images: Path) -> None:
    train(tmp_path, images, precision=precision)
    assert exported(tmp_path)["0.weight"].dtype == {"b": torch.bfloat16, "6": torch.float64}[precision[0]]


def test_weights_of_a_checkpoint_start_a_new_run(tmp_path: Path, images: Path) -> None:
    train(tmp_path / "a", images)
    for path in ("checkpoints/last.ckpt", "exported_models/exported_last.pt"):
        wrapper = TinyWrapper(seed=5)
        train(tmp_path / "b", images, model=wrapper, checkpoint=tmp_path / "a" / path, epochs=0, overwrite=True)
        assert_same(dict(exported(tmp_path / "b")), dict(exported(tmp_path / "a")))
    train(tmp_path / "a", images, checkpoint=tmp_path / "a" / "checkpoints" / "last.ckpt", overwrite=True)
    with pytest.raises(ValueError, match="is not of this model"):
        train(tmp_path / "c", images, model=TinyWrapper(dim=7), checkpoint=tmp_path / "a" / "checkpoints" / "last.ckpt")


class Unpicklable(TinyWrapper):
    def __init__(self) -> None:
        super().__init__()
        self.function = lambda x: x

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("this wrapper cannot be pickled")


def test_the_wrapper_is_never_pickled(tmp_path: Path, images: Path) -> None:
    train(tmp_path, images, model=Unpicklable())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": nn.Linear(2, 2)}, r"missing methods: get_model, forward_features, forward_pool, feature_dim"),
        ({"method": "simclrr"}, r"did you mean simclr"),
        ({"batch_size": "16"}, r"batch_size: got '16', expected int, at least 1"),
        ({"method_args": {"temprature": 1.0}}, r"no argument 'temprature'; did you mean temperature\?"),
        (
            {"method_args": {"temperature": -1}},
            r"method_args\.temperature: got -1, expected a number, at least 0\.0001",
        ),
        ({"transform_args": {"colour_jitter": None}}, r"no argument 'colour_jitter'; did you mean color_jitter\?"),
        ({"transform_args": {"random_resize": {"min_scale": 2}}}, r"transform_args\.random_resize: min_scale=2"),
        ({"trainer_args": {"accumulate_grad_batches": 2}}, r"set by the argument gradient_accumulation_steps"),
        ({"trainer_args": {"limit_train_batches": 2}}, r"set by the argument data"),
        ({"loader_args": {"shufle": 2}}, r"loader_args\.shufle: DataLoader has no argument 'shufle'; did you mean"),
        ({"optim": "adam"}, r"optim='adam'; did you mean adamw or adamw8bit\?"),
        ({"callbacks": {"modelcheckpoint": {}}}, r"did you mean model_checkpoint"),
        ({"loggers": {"json": {}}}, r"did you mean jsonl\?"),
        ({"checkpoint": "no.ckpt"}, r"checkpoint: no\.ckpt does not exist"),
        (
            {"checkpoint": "x", "resume_interrupted": True},
            r"checkpoint begins a new run and resume_interrupted goes on",
        ),
        ({"overwrite": True, "resume_interrupted": True}, r"overwrite removes the run that resume_interrupted goes on"),
        (
            {"method": "distillation", "method_args": {"teacher": TinyWrapper(), "queue_size": 10}},
            r"queue_size=10 must be",
        ),
        ({"data": "nowhere"}, r"data: nowhere does not exist"),
        ({"data": 3}, r"data must be a folder.*got int"),
        ({"epochs": -1}, r"epochs: got -1, expected int, at least 0$"),
        ({"on_bad_image": "skipp"}, r"did you mean 'skip'\?"),
        ({"precision": "33"}, r"Trainer cannot be made"),
        ({"streaming": {"tile": 3}}, r"streaming\.tile: StreamingArgs has no argument 'tile'"),
        ({"model": "resnet18"}, r"did you mean torchvision/resnet18"),
        ({"model": "torchvision/resnet19"}, r"did you mean torchvision/resnet18"),
        ({"devices": 3, "batch_size": 8}, r"batch_size=8 must be divisible by .* 3"),
        ({"transform_args": {"num_views": 3}}, r"transform_args\.num_views=3; simclr takes 2"),
        ({"transform_args": {"local_view": {"view_size": 16}}}, r"simclr takes no local views"),
        (
            {"loader_args": {"prefetch_factor": 2}},
            r"loader_args, with num_workers=0: prefetch_factor option could only",
        ),
        ({"optim_args": {"lr": -1.0}}, r"optim_args\.lr: got -1\.0, expected a number, at least 0"),
        ({"optim_args": {"lr": float("nan")}}, r"optim_args\.lr: got nan, expected a number"),
        ({"optim": "adamw", "optim_args": {"betas": [2, 0.9]}}, r"Invalid beta parameter at index 0: 2"),
        (
            {"transform_args": {"normalize": {"mean": [0.5] * 5, "std": [1] * 5}, "num_channels": 3}},
            r"of 5 channels and num_channels is 3",
        ),
        ({"callbacks": {"early_stopping": {"monitor": "val_loss"}}}, r"monitor='val_loss' is not logged"),
        ({"callbacks": {"model_checkpoint": {"save_top_k": 3}}}, r"save_top_k=3 needs a monitor"),
        ({"data": [torch.full((3, 24, 24), -5, dtype=torch.int16)] * 4}, r"values from -5 to -5, and none below 0"),
        ({"data": [torch.full((3, 24, 24), torch.nan)] * 4}, r"has float values from nan to nan"),
        (
            {"model": "timm/vit_tiny_patch16_224", "transform_args": {"image_size": 40}, "model_args": {"depth": 1}},
            r"forward_features failed on views .*: AssertionError: Input height \(40\) should be divisible",
        ),
    ],
)
def test_a_wrong_argument_is_named_and_out_stays_as_it_was(
    options: dict[str, Any], message: str, tmp_path: Path, images: Path
) -> None:
    given = {"images": options.pop("data", images), **options}
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_method_that_fails_in_its_first_step_leaves_out_as_it_was(tmp_path: Path, images: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(RuntimeError, match="channels"):
            train(tmp_path / name, images, "distillation", method_args={"teacher": TinyWrapper(5)})
    assert not (tmp_path / "new").exists() and not list((tmp_path / "empty").iterdir())


def test_all_errors_are_told_at_once(tmp_path: Path, images: Path) -> None:
    with pytest.raises(ValueError, match=r"3 errors") as caught:
        train(tmp_path / "out", images, epochs=-1, batch_size=0, method_args={"width": 3})
    assert len(str(caught.value).splitlines()) == 4


def test_a_batch_larger_than_the_data_becomes_all_of_it(tmp_path: Path, images: Path, caplog: Any) -> None:
    train(tmp_path, images, batch_size=64)
    assert "it becomes 10" in caplog.text
    assert checkpoint(tmp_path)["global_step"] == 1


def test_the_batch_size_of_the_loader_is_that_of_a_device_and_wins(tmp_path: Path, images: Path) -> None:
    train(tmp_path, images, batch_size=4, loader_args={"batch_size": 2})
    assert checkpoint(tmp_path)["global_step"] == 5


def test_other_processes_than_the_first_leave_out_and_its_log_alone(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "log").touch()
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        train(tmp_path, "nowhere")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="is not empty"):
        train(tmp_path, "nowhere")


def test_long_lists_are_cut_in_the_log_and_whole_in_the_configuration(tmp_path: Path, images: Path) -> None:
    files = [*images.iterdir(), images / "00.png", images / "01.png"]
    train(tmp_path, files, epochs=0)
    log, config = ((tmp_path / name).read_text() for name in ("train.log", "config.yaml"))
    assert "... and 2 more" in log and "model: TinyWrapper" in log
    assert log.count(".png") == 10 and config.count(".png") == 12


def test_accumulated_batches_scale_the_learning_rate(tmp_path: Path, images: Path) -> None:
    rates = []
    off = dict.fromkeys(("quality", "model_checkpoint", "model_export"))
    for steps in (1, 2):
        train(tmp_path / str(steps), images, gradient_accumulation_steps=steps, epochs=20, callbacks=off)
        rates.append(max(line["lr-SGD/params"] for line in metrics(tmp_path / str(steps)) if "lr-SGD/params" in line))
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.02)
    assert rates[0] == pytest.approx(0.3 * 4 / 256, rel=0.02)


def test_a_loss_that_is_no_number_ends_the_run_and_says_so(tmp_path: Path, images: Path) -> None:
    with pytest.raises(NotFiniteError, match="NaN or infinite") as caught:
        train(tmp_path, images, epochs=4, optim_args={"lr": 1e30})
    assert caught.value.step < 4 * 4


def test_bad_images_are_skipped_and_listed_or_fatal(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 8)
    (images / "empty.png").write_bytes(b"")
    (images / "text.jpg").write_text("no image")
    whole = (images / "00.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    train(tmp_path / "out", images, epochs=6)
    rows = (tmp_path / "out" / "bad_images.csv").read_text().splitlines()
    assert rows[0] == "image,reason"
    assert sorted(Path(row.partition(",")[0]).name for row in rows[1:]) == ["cut.png", "empty.png", "text.jpg"]
    assert "the file is empty" in "".join(rows)
    assert "3 images could not be read" in (tmp_path / "out" / "train.log").read_text()
    with pytest.raises(OSError, match="cannot read"):
        train(tmp_path / "raise", images, epochs=6, on_bad_image="raise")
    with pytest.raises(ValueError, match=r"2 images in a row cannot be used"):
        train(tmp_path / "none", [images / "empty.png", images / "text.jpg"], batch_size=2)
    assert not (tmp_path / "none").exists()


def test_a_method_of_ones_own_is_registered_and_named(tmp_path: Path, images: Path) -> None:
    @METHODS.register_module("test_align", force=True)
    class Align(Method):
        def __init__(self, embedding: Any, run: Any, power: float = 2.0) -> None:
            super().__init__(embedding, run)
            self.power = power

        def loss(self, views: Any, step: int) -> dict[str, Any]:
            first, second = (self.embedding.vectors(view) for view in views)
            return {"loss": (first - second).abs().pow(self.power).mean()}

    train(tmp_path, images, "test_align", method_args={"power": 1})
    assert len(losses(tmp_path)) == 1


PLUGIN = """
from torch import nn
from widefield.pretraining import Method

class Plugged(Method):
    def loss(self, views, step):
        return {"loss": self.embedding.vectors(views[0]).square().mean()}

class PluggedHead(nn.Linear):
    component_kind = "head"
"""


def test_installed_packages_bring_methods_and_components(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is installed, by its files: a module, and the folder in which pip notes what is in it."""
    (tmp_path / "site" / "plugged-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "plugged_module.py").write_text(PLUGIN)
    points = "[widefield.methods]\nplugged = plugged_module:Plugged\n"
    points += "[widefield.components]\nPluggedHead = plugged_module:PluggedHead\n"
    for name, text in (
        ("entry_points.txt", points),
        ("METADATA", "Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n"),
    ):
        (tmp_path / "site" / "plugged-1.0.dist-info" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    for registry in (METHODS, MODELS):  # which look once; nothing found, and so forgotten, at the end
        monkeypatch.setitem(registry.__dict__, "_plugins", type(registry)("fresh", group=registry._group)._plugins)
    train(tmp_path / "out", images, "plugged")
    assert len(losses(tmp_path / "out")) == 1
    assert [entry.summary for entry in METHODS.entries("plugged")] == ["from plugged"]
    assert MODELS.build({"type": "PluggedHead", "in_features": 3, "out_features": 2}).out_features == 2
    with pytest.raises(ValueError, match=r"no method named 'pluged'; did you mean plugged\?"):
        train(tmp_path / "x", images, "pluged")


def test_the_embedding_layer_has_embed_dim_channels(tmp_path: Path, images: Path) -> None:
    for method in ("simclr", "distillation", "densecl"):
        train(tmp_path / method, images, method, embed_dim=6)
        state = checkpoint(tmp_path / method)["state_dict"]
        assert state["method.embedding.embed_head.weight"].shape == (6, 12, 1, 1)


def test_the_teacher_of_dino_moves_ahead_of_a_step(tmp_path: Path, images: Path) -> None:
    """So it is the untrained model until the second step."""
    for steps in (1, 2):
        train(tmp_path / str(steps), images, "dino", trainer_args={"max_steps": steps})
    untrained = TinyWrapper().get_model().state_dict()
    assert torch.equal(exported(tmp_path / "1")["0.weight"], untrained["0.weight"])
    assert not torch.equal(exported(tmp_path / "2")["0.weight"], untrained["0.weight"])


def test_of_a_wrapper_the_part_is_exported_that_it_calls_its_model(tmp_path: Path, images: Path) -> None:
    class Part(TinyWrapper):
        def get_model(self) -> nn.Module:
            return self.model[4]

    train(tmp_path, images, model=Part())
    assert exported(tmp_path).keys() == {"weight", "bias"}


@pytest.mark.parametrize("method", ["simclr", "dino"])
def test_a_model_in_evaluation_mode_trains_as_one_in_training_mode(method: str, tmp_path: Path, images: Path) -> None:
    train(tmp_path / "train", images, method, model=TinyWrapper(dropout=0.5))
    train(tmp_path / "eval", images, method, model=TinyWrapper(dropout=0.5).eval())
    assert_same(exported(tmp_path / "eval"), exported(tmp_path / "train"))
    assert bool((exported(tmp_path / "eval")["1.running_mean"] != 0).any())


def test_a_frozen_norm_keeps_its_statistics_if_it_is_in_evaluation_mode(tmp_path: Path, images: Path) -> None:
    for name, evaluating in (("eval", True), ("train", False)):
        wrapper = TinyWrapper()
        wrapper.model[1].requires_grad_(False).train(not evaluating)
        train(tmp_path / name, images, model=wrapper)
        assert wrapper.model[0].training and wrapper.model[1].training != evaluating
        assert bool((exported(tmp_path / name)["1.running_mean"] == 0).all()) == evaluating


def test_dino_exports_the_teacher(tmp_path: Path, images: Path) -> None:
    train(tmp_path, images, "dino", epochs=2)
    content = checkpoint(tmp_path)
    assert content["widefield"]["wrapped_model"] == "method.teacher_embedding.wrapped_model."
    assert torch.equal(
        exported(tmp_path)["0.weight"], content["state_dict"]["method.teacher_embedding.wrapped_model.model.0.weight"]
    )
    assert not torch.equal(
        exported(tmp_path)["0.weight"], content["state_dict"]["method.embedding.wrapped_model.model.0.weight"]
    )


def test_a_model_that_is_its_own_teacher_still_trains(tmp_path: Path, images: Path) -> None:
    model = TinyWrapper()
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    train(tmp_path, images, "distillation", model=model, method_args={"teacher": model})
    assert not torch.equal(exported(tmp_path)["0.weight"], before["0.weight"])


def test_no_teacher_is_in_a_checkpoint_of_distillation(tmp_path: Path, images: Path) -> None:
    train(tmp_path, images, "distillation")
    names = checkpoint(tmp_path)["state_dict"]
    assert not any("teacher" in name for name in names)
    with pytest.raises(ValueError, match="would have random weights"):
        train(tmp_path / "x", images, "distillation", method_args={"teacher": "torchvision/resnet18"})
    with pytest.raises(ValueError, match=r"method_args: Distillation needs teacher"):
        train(tmp_path / "x", images, "distillation", method_args={})
