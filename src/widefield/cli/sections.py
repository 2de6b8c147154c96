"""The top-level keys of a configuration of `widefield fit`, and the classes that they are given to."""

from typing import Annotated, Any

from widefield.components.metrics import METRICS
from widefield.config import Section, Sections
from widefield.registry import MODELS, ComponentOf
from widefield.registry.data_index import DATASETS

SECTIONS: Sections = {
    "model": Section(
        component=ComponentOf(MODELS, "model"),
        base="lightning.pytorch:LightningModule",
        default="widefield.models:Classifier",
        given=("class_names",),
    ),
    "data": Section(
        component=ComponentOf(DATASETS, "data module"),
        base="lightning.pytorch:LightningDataModule",
        default="widefield.data:LabelledImages",
    ),
    "metrics": Annotated[list[dict[str, Any]] | None, ComponentOf(METRICS)],
    "trainer": Section(base="lightning.pytorch:Trainer", default="lightning.pytorch:Trainer"),
    "optimizer": Section(base="torch.optim:Optimizer", given=("params",)),
    "lr_scheduler": Section(base="torch.optim.lr_scheduler:LRScheduler", given=("optimizer",)),
    "seed_everything": bool | int,
    "imports": list[str],
}
