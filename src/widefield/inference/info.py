"""Data that belong to a trained model beside its weights: class names, and how images are read."""

from dataclasses import dataclass, field

from torch import nn

from widefield.data import Pipeline
from widefield.images import Alpha


@dataclass(frozen=True)
class ModelInfo:
    """Class names of a model, and how its images are read.

    Attributes:
        class_names: Names of the classes; None where they have none.
        level: Level of the pyramids that the model was trained on, 0 the largest.
        pipeline: What images went through in validation.
        alpha: "keep" where the model was trained with a last channel that files mark as alpha, see `open_image`.
    """

    class_names: tuple[str, ...] | None = None
    level: int = 0
    pipeline: Pipeline = field(default_factory=Pipeline)
    alpha: Alpha = "drop"

    def names(self, count: int) -> tuple[str, ...]:
        """Names of so many scores: those of the classes, and numbers where there are no names."""
        known = self.class_names or ()
        return (*known[:count], *(str(index) for index in range(len(known), count)))


def info_of(model: nn.Module) -> ModelInfo:
    """Return the info that `get_model` attached to `model`, or else what the model itself has."""
    found = model.__dict__.get("_info")
    if isinstance(found, ModelInfo):
        return found
    names = getattr(model, "class_names", None)
    return ModelInfo(None if names is None else tuple(names))


def set_info(model: nn.Module, info: ModelInfo) -> None:
    """Keep `info` with the model."""
    model.__dict__["_info"] = info
