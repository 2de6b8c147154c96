"""Top-level keys of MMPretrain: what is written in their place, and the values that mean nothing here."""

from collections.abc import Callable, Mapping
from typing import Any

from widefield.config.sections import Foreign


def _always(value: Any) -> bool:
    return True


def _off(*names: str) -> Callable[[Any], bool]:
    """Return the test for a dictionary in which none of these is set."""
    return lambda value: not isinstance(value, Mapping) or not any(value.get(name) for name in names)


def _unseeded(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("seed") is None and not value.get("deterministic")


def _is_local(value: Any) -> bool:
    return "Tensorboard" not in str(value) and "Wandb" not in str(value)


def _is_empty(value: Any) -> bool:
    return not value or value == "none"


_LOADER = (
    "data.{} with data.type=Datasets, its transforms in the place of a pipeline, data.batch_size, data.num_workers"
)
FOREIGN = {
    "train_dataloader": Foreign(_LOADER.format("train")),
    "val_dataloader": Foreign(_LOADER.format("val")),
    "test_dataloader": Foreign(_LOADER.format("test")),
    "train_pipeline": Foreign("data.train.transforms"),
    "val_pipeline": Foreign("data.val.transforms"),
    "test_pipeline": Foreign("data.test.transforms"),
    "data_preprocessor": Foreign("model.data_preprocessor"),
    "optim_wrapper": Foreign(
        "optimizer, paramwise_cfg, and trainer.gradient_clip_val, trainer.accumulate_grad_batches, trainer.precision"
    ),
    "param_scheduler": Foreign("lr_scheduler, a schedule or a list of them, one after the other"),
    "train_cfg": Foreign("trainer.max_epochs and trainer.check_val_every_n_epoch, or trainer.max_steps"),
    "val_cfg": Foreign("nothing: validation has no loop to choose", _is_empty),
    "test_cfg": Foreign("nothing: the test has no loop to choose", _is_empty),
    "val_evaluator": Foreign("metrics, a list"),
    "test_evaluator": Foreign("metrics, a list, for validation and test"),
    "default_hooks": Foreign(
        "trainer.log_every_n_steps and trainer.callbacks; best.ckpt and last.ckpt are always kept"
    ),
    "custom_hooks": Foreign("trainer.callbacks, such as {type: EMAWeightAveraging, decay: 0.9999}"),
    "custom_imports": Foreign("imports, a list of files and modules"),
    "load_from": Foreign("model.pretrained", _is_empty),
    "resume": Foreign("widefield fit --resume --out DIR", _is_empty),
    "work_dir": Foreign("--out DIR"),
    "launcher": Foreign("trainer.devices and trainer.strategy", _is_empty),
    "randomness": Foreign("seed_everything and trainer.deterministic", _unseeded),
    "env_cfg": Foreign("trainer.benchmark", _off("cudnn_benchmark")),
    "auto_scale_lr": Foreign("optimizer.lr for your batch size", _off("enable")),
    "visualizer": Foreign("loggers, such as loggers.tensorboard={}", _is_local),
    "vis_backends": Foreign("loggers, such as loggers.tensorboard={}", _is_local),
    "tta_model": Foreign("widefield test --tta hflip"),
    "tta_pipeline": Foreign("widefield test --tta hflip"),
    "default_scope": Foreign("nothing: there is one registry", _always),
    "log_level": Foreign("--verbose", _always),
    "log_processor": Foreign("nothing: numbers are of epochs", _always),
    "find_unused_parameters": Foreign("trainer.strategy=ddp_find_unused_parameters_true", _always),
    "dataset_type": Foreign("the type of a data set", _always),
    "data_root": Foreign("the root of a data set", _always),
}
"""Values that pass the test of their key are accepted, and have no effect."""
