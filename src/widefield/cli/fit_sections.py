"""The top-level keys of a configuration of `widefield fit`, and the classes that they are given to."""

from typing import Annotated, Any

from widefield.cli.mmpretrain.keys import FOREIGN
from widefield.components.metrics import METRICS
from widefield.config import Section, Sections
from widefield.registry import DATASETS, MODELS, ComponentOf, Range

_NOT_NEGATIVE, _POSITIVE, _OR_ENDLESS = Range(0), Range(1), Range(-1)

SECTIONS: Sections = {
    "model": Section(
        component=ComponentOf(MODELS, "model"),
        base="lightning.pytorch:LightningModule",
        default="widefield.models:Classifier",
        given=("class_names", "target", "in_channels", "ignore_index"),
        given_to="widefield.models:FromCheckpoint",
        ranges={"lr": _NOT_NEGATIVE, "weight_decay": _NOT_NEGATIVE},
    ),
    "data": Section(
        component=ComponentOf(DATASETS, "data module"),
        base="lightning.pytorch:LightningDataModule",
        default="widefield.data:LabelledImages",
    ),
    "metrics": Annotated[list[dict[str, Any]] | None, ComponentOf(METRICS)],
    "trainer": Section(
        base="lightning.pytorch:Trainer",
        default="lightning.pytorch:Trainer",
        ranges={
            "max_epochs": _OR_ENDLESS,
            "max_steps": _OR_ENDLESS,
            "min_epochs": _NOT_NEGATIVE,
            "min_steps": _NOT_NEGATIVE,
            "accumulate_grad_batches": _POSITIVE,
            "check_val_every_n_epoch": _POSITIVE,
            "val_check_interval": Range(1e-6),  # a share of an epoch, or batches; Lightning divides by it
            "gradient_clip_val": _NOT_NEGATIVE,
            "log_every_n_steps": _NOT_NEGATIVE,
            "num_sanity_val_steps": _OR_ENDLESS,
        },
    ),
    "optimizer": Section(
        base="torch.optim:Optimizer",
        given=("params",),
        ranges=dict.fromkeys(("lr", "weight_decay", "momentum", "eps"), _NOT_NEGATIVE),
    ),
    "paramwise_cfg": Section(default="widefield.modules.optimization:ParameterOptions"),
    "lr_scheduler": Section(
        base="lightning.pytorch.cli:LRScheduler",  # that of torch; Lightning's ReduceLROnPlateau is loaded with it
        given=("optimizer",),
        also={"begin": int, "end": int, "by_epoch": bool, "convert_to_iter_based": bool},
        ranges={
            "begin": _NOT_NEGATIVE,
            **dict.fromkeys(("end", "total_iters", "T_max", "T_0", "step_size", "total_steps"), _POSITIVE),
        },
        several=True,
    ),
    "loggers": Section(default="widefield.pretraining.loggers:LoggerArgs"),
    "seed_everything": bool | Annotated[int, _NOT_NEGATIVE],
    "imports": list[str],
    **FOREIGN,
}
