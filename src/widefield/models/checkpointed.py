"""The common part of models by name: hyperparameters that are plain data, and a checkpoint from which the same model is made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from widefield.components.checkpoints import read_torch_file
from widefield.modules import BaseModule
from widefield.streaming.tiles import Normalisation


class FromCheckpoint(BaseModule):
    """A model whose hyperparameters, with how it normalises, stand in its checkpoints as plain data.

    Attributes:
        class_names: Names of what it predicts.
        target: Its task.
        model_name: The name of its network.
    """

    class_names: list[str]
    target: Any
    model_name: str
    _plain: dict[str, Any]

    @property
    def reads_pixels(self) -> bool:
        """True if its images are images; False if they are features."""
        return True

    def normalise_by(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, value_range: tuple[float, float] | None
    ) -> None:
        """Normalise images so from now on, and say so in checkpoints; see `StreamingCNN`."""
        self.stream_network.normalisation = Normalisation.parse(mean, std, value_range)
        self.save_plain_hyperparameters(**self._plain)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        used = checkpoint["hyper_parameters"]
        self.normalise_by(used["mean"], used["std"], used["value_range"])

    @classmethod
    def from_checkpoint(cls, path: str | Path, **options: Any) -> tuple[Self, dict[str, Any]]:
        """A model with the weights of a checkpoint, and the whole checkpoint (tensors and plain data).

        Args:
            path: A `.ckpt` file that `fit` wrote.
            options: `tile_size` and `memory_budget`, which belong to the machine and are not in the checkpoint.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a checkpoint of such a model.
        """
        checkpoint = read_checkpoint(path)
        try:
            model = cls(**checkpoint["hyper_parameters"], **options)
            model.load_state_dict(checkpoint["state_dict"])
        except (KeyError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{path} is not a checkpoint that `widefield fit` wrote ({reason}); give its .ckpt file"
            ) from error
        return model, checkpoint


def pixels_in(checkpoint: Mapping[str, Any]) -> tuple[int, str] | None:
    """Return the number of channels and the type of the pixels of the training images; None if a checkpoint does not say so."""
    parts = (part for key, part in checkpoint.items() if key != "hyper_parameters" and isinstance(part, dict))
    found = next((part["pixels"] for part in parts if "class_names" in part and "pixels" in part), None)
    return None if found is None else (int(found[0]), str(found[1]))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, read with `weights_only=True`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read as a checkpoint.
    """
    path = Path(path)
    checkpoint = read_torch_file(path)
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} holds a {type(checkpoint).__name__}, not a checkpoint; give a .ckpt file that `widefield fit` wrote"
        )
    return checkpoint
