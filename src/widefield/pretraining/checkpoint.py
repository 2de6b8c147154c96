"""Checkpoints of `widefield.train`, read where neither the run nor its code is at hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widefield.models.weights import read_torch_file
from widefield.pretraining.embedding import EmbeddingModel, StreamingArgs
from widefield.pretraining.module import KEY
from widefield.pretraining.transform_args import Normalize, TransformArgs
from widefield.pretraining.views import Views, whole_image
from widefield.pretraining.wrapping import wrap

Part = Literal["model", "wrapped_model", "embedding_model"]

_WRAPPED, _HEAD = "wrapped_model.", "embed_head."
_PUBLISHED_WEIGHTS = ("weights", "pretrained")


def named_model(model: Any, model_args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What a checkpoint keeps to make the model anew: its name and arguments, if it has a name and they are plain data.

    Which published weights it began with is left out: it gets those of the checkpoint.
    """
    args = {name: value for name, value in (model_args or {}).items() if name not in _PUBLISHED_WEIGHTS}
    return {"name": model, "args": args} if isinstance(model, str) and _is_plain(args) else None


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint of `widefield.train` holds of the model that is exported.

    Attributes:
        path: The file.
        about: What the run says of itself.
        state: Weights of the whole run by name.
    """

    path: Path
    about: dict[str, Any]
    state: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """The checkpoint at `path`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is another file.
        """
        content = read_torch_file(path)
        if not isinstance(content, dict) or KEY not in content:
            raise ValueError(
                f"checkpoint: {path} was not written by widefield.train; give a .ckpt file in the folder checkpoints of a run"
            )
        return cls(path, content[KEY], content["state_dict"])

    def weights(self, part: Part) -> dict[str, Tensor]:
        """The state dict of a part.

        Raises:
            ValueError: The weights of the model alone cannot be told from the others.
        """
        wrapped: str = self.about["wrapped_model"]
        if part == "embedding_model":
            head = self._under(self.about["embed_head"], _HEAD)
            return {**self._under(wrapped, _WRAPPED), **head}
        prefix = wrapped if part == "wrapped_model" else self.about["model"]
        if prefix is None:
            raise ValueError(
                f"checkpoint: get_model() of the wrapper in {self.path} returned no part of it, so which weights are those of the "
                'model is unknown; export part="wrapped_model"'
            )
        return self._under(prefix, "")

    def embedding_model(self, model: Any = None, streaming: StreamingArgs | None = None) -> EmbeddingModel:
        """The trained model with its embedding layer.

        Args:
            model: As `widefield.train` takes it; None makes the model anew if the run was given it by name.
            streaming: How to stream it; None runs it on whole images.

        Raises:
            ValueError: It cannot be made anew, or the weights are of another model.
        """
        named = self.about.get("named_model") if model is None else None
        if model is None and named is None:
            raise ValueError(
                f"checkpoint: {self.path} holds weights and no code, and the model was not given by name; "
                "give what was trained again, as model=MyWrapper(...)"
            )
        weights = self.weights("embedding_model")
        head = weights.get(f"{_HEAD}weight")
        with torch.random.fork_rng(devices=[]):  # first weights are drawn, though they go
            wrapper = (
                wrap(model, None, self.num_channels)
                if named is None
                else wrap(named["name"], named["args"], self.num_channels)
            )
            embedding = EmbeddingModel(wrapper, None if head is None else len(head), streaming)
        try:
            embedding.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"checkpoint: {self.path} is not of this model: {error}") from error
        return embedding

    def views(self, size: int | tuple[int, int]) -> Views:
        """Whole images resized to `size`, with the channels and values of the training."""
        kept = self.about["transforms"]
        return whole_image(TransformArgs(num_channels=kept["num_channels"], value_range=kept["value_range"]), size)

    @property
    def num_channels(self) -> int:
        """Channels of the images of the training."""
        return int(self.about["transforms"]["num_channels"])

    @property
    def normalize(self) -> Normalize:
        """Mean and standard deviation of the training, one per channel."""
        return Normalize(**self.about["transforms"]["normalize"])

    def _under(self, prefix: str, new: str) -> dict[str, Tensor]:
        return {new + name.removeprefix(prefix): value for name, value in self.state.items() if name.startswith(prefix)}


def part_of(embedding: EmbeddingModel, part: Part) -> nn.Module:
    """The module that is called `part`."""
    if part == "embedding_model":
        return embedding
    return embedding.wrapped_model if part == "wrapped_model" else embedding.wrapped_model.get_model()


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
