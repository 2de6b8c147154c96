"""Checkpoints of `widefield.train`, read where neither the run nor its code is at hand, and `widefield.export`."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widefield.components.checkpoints import read_torch_file
from widefield.components.models.base_model import is_plain
from widefield.models import (
    GRAPHS,
    Classifier,
    FromCheckpoint,
    class_of,
    load_state,
    load_weights,
    pixels_in,
    write_graph,
)
from widefield.models.instances import is_patches
from widefield.models.lora import has_adapters, merged, write_adapters
from widefield.pretraining.embedding import EmbeddingModel, StreamingArgs
from widefield.pretraining.out import check_file
from widefield.pretraining.settings import Errors, arguments
from widefield.pretraining.transform_args import Normalize, Size, TransformArgs
from widefield.pretraining.wrapping import wrap
from widefield.writing import write_safetensors, write_torch_file

KEY = "widefield"
"""The key of a checkpoint under which our part stands."""
Part = Literal["model", "wrapped_model", "embedding_model", "adapters"]


class ModelPart(StrEnum):
    """Parts of a checkpoint, as `export` takes them."""

    MODEL = "model"
    WRAPPED_MODEL = "wrapped_model"
    EMBEDDING_MODEL = "embedding_model"
    ADAPTERS = "adapters"


class ModelFormat(StrEnum):
    """Formats of `export`."""

    PACKAGE_DEFAULT = "package_default"
    TORCH_MODEL = "torch_model"
    TORCH_STATE_DICT = "torch_state_dict"
    SAFETENSORS = "safetensors"
    ONNX = "onnx"
    TORCH_EXPORT = "torch_export"


_WRAPPED, _HEAD = "wrapped_model.", "embed_head."
_PUBLISHED_WEIGHTS = ("weights", "pretrained")


def named_model(model: Any, model_args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return what makes the model anew: its name and arguments, if it has a name and they are plain data; else None.

    Which published weights it began with is left out: it gets those of the checkpoint.
    """
    args = {name: value for name, value in (model_args or {}).items() if name not in _PUBLISHED_WEIGHTS}
    return {"name": model, "args": args} if isinstance(model, str) and is_plain(args) else None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of `widefield.train`.

    Attributes:
        path: The file.
        about: What the run says of itself.
        state: Weights of the whole run by name.
        epoch, step: Where it was written.
    """

    path: Path
    about: dict[str, Any]
    state: dict[str, Tensor]
    epoch: int
    step: int

    @classmethod
    def of(cls, path: Path, content: Any) -> "Checkpoint | None":
        """Return the checkpoint that `content`, read from `path`, is; None if it was not written by `widefield.train`."""
        if not isinstance(content, dict) or KEY not in content:
            return None
        return cls(path, content[KEY], content["state_dict"], content["epoch"], content["global_step"])

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Return the checkpoint at `path`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is another file.
        """
        content = {} if path.suffix == ".safetensors" and path.is_file() else read_torch_file(path)
        found = cls.of(path, content)
        if found is None:
            raise ValueError(
                f"checkpoint: {path} was not written by widefield.train; give a .ckpt file in the folder checkpoints of a run. "
                f"It {_other_file(path, content)}"
            )
        return found

    def weights(self, part: Part) -> dict[str, Tensor]:
        """The state dict of a part.

        Raises:
            ValueError: The weights of the model alone cannot be told from the others.
        """
        if part == "adapters":
            raise ValueError(f"part='adapters' is for checkpoints of `widefield fit --lora`, and {self.path} has none")
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
            made, args = (model, None) if named is None else (named["name"], named["args"])
            wrapper = wrap(made, args, self.transforms.channels)
            embedding = EmbeddingModel(wrapper, None if head is None else len(head), streaming)
        try:
            embedding.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"checkpoint: {self.path} is not of this model: {error}") from error
        return embedding

    @property
    def transforms(self) -> TransformArgs:
        """Channels, values and normalisation of the images of the training; all else by default."""
        kept = self.about["transforms"]
        return TransformArgs(
            num_channels=kept["num_channels"], value_range=kept["value_range"], normalize=Normalize(**kept["normalize"])
        )

    def _under(self, prefix: str, new: str) -> dict[str, Tensor]:
        return {new + name.removeprefix(prefix): value for name, value in self.state.items() if name.startswith(prefix)}


def _other_file(path: Path, content: Any) -> str:
    """Return what a file is that is no checkpoint of `widefield.train`, and what opens it."""
    if not isinstance(content, dict):
        return "holds a whole module: torch.load(FILE, weights_only=False) opens it, if you trust whoever wrote it"
    if "pytorch-lightning_version" in content:
        return "is of another Lightning module: widefield.get_model(FILE) opens it if `widefield fit` wrote it"
    run = path.parent.parent / "checkpoints" / "last.ckpt"
    beside = f"; the checkpoint of its run is {run}" if run.is_file() else ""
    return f"holds weights alone: widefield.load_model_from_checkpoint(FILE, model=...) loads them into a model{beside}"


def load_checkpoint(wrapper: Any, path: Path) -> None:
    """Load the model's weights of a checkpoint of `train`, or an exported state dict, into `wrapper`.

    A classifier more or less is no error, see `widefield.models.load_weights`.

    Raises:
        ValueError: They are of another model.
    """
    try:
        found = None if path.suffix == ".safetensors" else Checkpoint.of(path, read_torch_file(path))
        if found is None:
            load_weights(wrapper.get_model(), path)
        else:
            load_state(wrapper, found.weights("wrapped_model"), path)
    except ValueError as error:
        raise ValueError(f"checkpoint: {path} is not of this model: {error}") from error


def read_to_resume(path: Path, method: str) -> Checkpoint | None:
    """Return the checkpoint that a run goes on with, its weights without their values; None if there is no file.

    Raises:
        ValueError: It is another file, or of another method.
    """
    if not path.is_file():
        return None
    found = Checkpoint.of(path, read_torch_file(path))
    if found is None:
        raise ValueError(f"{path} is no checkpoint of widefield.train, so it cannot be resumed")
    before = found.about["method"]
    if before != method:
        raise ValueError(
            f"{path} is of method={before!r}, and method={method!r} was given; resume with the arguments of the run"
        )
    shapes = {name: value.to("meta") for name, value in found.state.items() if isinstance(value, Tensor)}
    return replace(found, state=shapes)


def part_of(embedding: EmbeddingModel, part: Part) -> nn.Module:
    """The module that is called `part`."""
    if part == "embedding_model":
        return embedding
    return embedding.wrapped_model if part == "wrapped_model" else embedding.wrapped_model.get_model()


def load_model_from_checkpoint(
    checkpoint: Path | str, device: str | torch.device | None = None, *, model: Any = None
) -> nn.Module:
    """Return the trained model of a checkpoint of `widefield.train`, what `get_model` of its wrapper returns, in evaluation mode.

    Args:
        checkpoint: A .ckpt file in the folder `checkpoints` of a run, or an exported state dict.
        device: Where it is put; None: the CPU.
        model: The model again, as `widefield.train` takes it; it is loaded with the weights. Needed for a state dict, and if the
            run was not given the model by name, because files hold no code.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It is another file, or `model` is needed or another one.
    """
    path = Path(checkpoint)
    if model is None or path.suffix == ".ckpt":
        wrapper = Checkpoint.read(path).embedding_model(model).wrapped_model
    else:
        wrapper = wrap(model)
        load_checkpoint(wrapper, path)
    found: nn.Module = wrapper.get_model().to(device)
    return found.eval()


def load_model(model: Path | str, device: str | torch.device | None = None) -> nn.Module:
    """Return the trained model of a checkpoint; `load_model_from_checkpoint` says more."""
    return load_model_from_checkpoint(model, device)


ExportFormat = Literal["package_default", "torch_state_dict", "torch_model", "safetensors", "onnx", "torch_export"]


def export(
    out: Path | str,
    checkpoint: Path | str,
    *,
    part: Part | ModelPart = "model",
    format: ExportFormat | ModelFormat = "package_default",
    overwrite: bool = False,
    model: Any = None,
    image_size: Size | None = None,
) -> None:
    """Write the trained model of a checkpoint to a file of its own, whole or not at all.

    Args:
        out: The file.
        checkpoint: A .ckpt file in the folder `checkpoints` of a run; or one that `widefield fit` wrote of a network by name.
        part: "model": what `get_model` of the wrapper returns; "wrapped_model": the wrapper; "embedding_model": the wrapper with
            the embedding layer. Of a checkpoint of `fit`, "model" is the network under the names of torchvision or timm, or the
            encoder of patches without the head, adapters merged; "adapters" are these alone, and `out` a folder for
            `peft.PeftModel.from_pretrained`.
        format: "torch_state_dict": tensors, for `torch.load(..., weights_only=True)`; "torch_model": the module itself, pickled;
            "safetensors"; "package_default": what the package of the model loads by itself, which for torchvision, timm and
            models of one's own is a state dict. "onnx" and "torch_export": the whole model as a graph, see `write_graph`, which is
            compared with the model on random images before the file is left. Of a checkpoint of `fit` it takes images as they are
            stored, normalisation being in it, and gives logits; of one of `pretrain`, images that are normalised already.
        overwrite: Replace a file that is there.
        model: The model again, as `widefield.train` takes it; it is loaded with the weights. Needed for "torch_model", "onnx" and
            "torch_export" if the run was not given it by name, because checkpoints hold no code.
        image_size: Height and width of the images that a graph takes, these alone; None leaves both open.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: An argument cannot be used; what is at `out` is as it was.
        DifferentGraphError: A graph does not compute what the model computes; what is at `out` is as it was.
        MissingExtraError: "onnx" needs packages that are not installed.
    """
    errors = Errors()
    given = arguments(export, locals(), errors)
    errors.raise_if_any("widefield.export")
    check_file(given.out, given.overwrite)
    if given.format == "package_default" and given.part not in ("model", "adapters"):
        raise ValueError(
            f'format="package_default" is for part="model", which a package knows; give "torch_state_dict", "torch_model" or '
            f'"safetensors" for part={given.part!r}'
        )
    is_graph = given.format in GRAPHS
    if given.image_size is not None and not is_graph:
        raise ValueError(
            f"image_size={given.image_size!r} is for format=onnx and torch_export, and the format is {given.format!r}; leave it out"
        )
    if is_graph and given.part == "adapters":
        raise ValueError(f"part='adapters' are weights alone, and {given.format!r} is a whole model; give part='model'")
    if (found_by_name := _named(Path(given.checkpoint))) is not None:
        _export_named(*found_by_name, given)
        return
    found = Checkpoint.read(given.checkpoint)
    if is_graph:
        whole = part_of(found.embedding_model(given.model), given.part)
        write_graph(whole, given.format, given.out, found.transforms.channels, image_size=_pair(given.image_size))
        return
    if given.model is None and given.format != "torch_model":
        module, weights = None, found.weights(given.part)
    else:
        module = part_of(found.embedding_model(given.model), given.part)
        weights = module.state_dict()
    _write(module, weights, given.format, given.out)


def _write(module: nn.Module | None, weights: dict[str, Tensor], format: str, out: Path) -> None:
    if format == "safetensors":
        write_safetensors(weights, out)
    elif format == "torch_model":
        try:
            write_torch_file(module, out)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise ValueError(
                f'format="torch_model": the {type(module).__name__} cannot be pickled: {error}; give "torch_state_dict"'
            ) from error
    else:
        write_torch_file(weights, out)


def _pair(size: Size | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def _named(path: Path) -> tuple[FromCheckpoint, dict[str, Any]] | None:
    """Return the model of a checkpoint that `widefield fit` wrote of a network by name, and its content; None for another file."""
    content = {} if path.suffix == ".safetensors" else read_torch_file(path)
    if not isinstance(content, dict) or "model_name" not in content.get("hyper_parameters", {}):
        return None
    return class_of(content["hyper_parameters"]).from_checkpoint(path)


def _export_named(model: FromCheckpoint, checkpoint: dict[str, Any], given: Any) -> None:
    """Raises ValueError for a part that it does not have."""
    encodes = is_patches(model.model_name)
    if given.part == "adapters":
        if not isinstance(model, Classifier) or not encodes or not has_adapters(model.encoder):
            raise ValueError(f"part='adapters': {given.checkpoint} has none; `widefield fit --lora RANK` trains them")
        write_adapters(model.encoder, given.out)
    elif given.part != "model":
        raise ValueError(
            f"part={given.part!r} is of `widefield pretrain`, and {given.checkpoint} of `fit`; give 'model'"
        )
    elif given.format in GRAPHS:
        channels, type_of_pixels = pixels_in(checkpoint) or (checkpoint["hyper_parameters"]["in_channels"], "float32")
        dtype = getattr(torch, type_of_pixels)
        write_graph(model.plain_model(), given.format, given.out, channels, dtype, _pair(given.image_size))
    else:
        module = merged(model.encoder) if isinstance(model, Classifier) and encodes else model.plain_model()
        _write(module, model.plain_state_dict(), given.format, given.out)
