"""Checks of a checkpoint before a run goes on with it: settings and weights must be those of the run that wrote it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from widefield.models.weights import read_torch_file
from widefield.pretraining.arguments import Settings
from widefield.pretraining.module import KEY


@dataclass(frozen=True)
class Resumed:
    """Facts of the checkpoint that a run goes on with.

    Attributes:
        epoch, step: Where it was written.
        about: What the run says of itself.
        shapes: Of its weights.
    """

    path: Path
    epoch: int
    step: int
    about: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: Path, method: str) -> "Resumed | None":
        """None if there is no checkpoint at `path`.

        Raises:
            ValueError: It is another file, or of another method.
        """
        if not path.is_file():
            return None
        content = read_torch_file(path)
        if not isinstance(content, dict) or KEY not in content:
            raise ValueError(f"{path} is no checkpoint of widefield.train, so it cannot be resumed")
        before = content[KEY]["method"]
        if before != method:
            raise ValueError(
                f"{path} is of method={before!r}, and method={method!r} was given; resume with the arguments of the run"
            )
        return cls(path, content["epoch"], content["global_step"], content[KEY], _shapes(content["state_dict"]))

    def check(self, batches: int, settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        """Raises ValueError unless a run with these batches in an epoch, `settings_of` it and weights can go on."""
        before = self.about["batches_per_epoch"]
        if before != batches:
            raise ValueError(
                f"the run had {before} batches in an epoch, and with these data and batch_size there are {batches}; resume "
                "with those of the run"
            )
        known = self.about.get("settings", {})
        changed = [
            f"  {name} was {known[name]!r} and is {value!r}"
            for name, value in settings.items()
            if name in known and known[name] != value
        ]
        if changed:
            raise ValueError(
                "\n".join([f"{self.path} is of a run with other arguments:", *changed])
                + "\nresume with those of the run, or begin a new run with its weights: checkpoint=..., and another out"
            )
        shapes = _shapes(state)
        names = sorted(n for n in {*self.shapes, *shapes} if self.shapes.get(n) != shapes.get(n))
        if names:
            first = names[0]
            raise ValueError(
                f"{self.path} is of another model, or of a method with other method_args: {len(names)} weights differ, such "
                f"as {first}, {_told(self.shapes.get(first))} there and {_told(shapes.get(first))} here; resume with those of "
                "the run"
            )


def settings_of(settings: Settings, batch_size: int, images: int) -> dict[str, Any]:
    """Return the settings of a run that is resumed which must not change: another value would be ignored, or spoil schedules."""
    given = settings.given
    return {
        "images": images,
        "batch_size": batch_size,
        "gradient_accumulation_steps": given.gradient_accumulation_steps,
        "seed": given.seed,
        "embed_dim": given.embed_dim,
        "optim": settings.optim.name,
        "optim_args": asdict(settings.optim),
        "transform_args": asdict(settings.transforms),
        "method_args": {
            name: value
            for name, value in settings.method_args.items()
            if value is None or isinstance(value, (bool, int, float, str))  # others are objects
        },
    }


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def _told(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {shape}"
