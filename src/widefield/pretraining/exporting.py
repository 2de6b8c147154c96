"""`widefield.export`: a trained model out of a checkpoint."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save
from torch import Tensor

from widefield.pretraining.checkpoint import Checkpoint, Part, part_of
from widefield.pretraining.out import check_file
from widefield.pretraining.settings import Errors, arguments
from widefield.writing import replacing, write_torch_file

ExportFormat = Literal["package_default", "torch_state_dict", "torch_model", "safetensors"]


@dataclass(frozen=True)
class _Arguments:
    out: Path
    checkpoint: Path
    part: Part
    format: ExportFormat
    overwrite: bool
    model: Any


def export(
    out: str | Path,
    checkpoint: str | Path,
    *,
    part: Part = "model",
    format: ExportFormat = "package_default",
    overwrite: bool = False,
    model: Any = None,
) -> None:
    """Write the trained model of a checkpoint to a file of its own, whole or not at all.

    Args:
        out: The file.
        checkpoint: A .ckpt file in the folder `checkpoints` of a run.
        part: "model": what `get_model` of the wrapper returns; "wrapped_model": the wrapper; "embedding_model": the wrapper with
            the embedding layer.
        format: "torch_state_dict": tensors, for `torch.load(..., weights_only=True)`; "torch_model": the module itself, pickled;
            "safetensors"; "package_default": what the package of the model loads by itself, which for torchvision, timm and
            models of one's own is a state dict.
        overwrite: Replace a file that is there.
        model: The model again, as `widefield.train` takes it; it is loaded with the weights. Needed for "torch_model" if the
            run was not given it by name, because checkpoints hold no code.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: An argument cannot be used; what is at `out` is as it was.
    """
    errors = Errors()
    given = arguments(_Arguments, locals(), errors)
    errors.raise_if_any("widefield.export")
    check_file(given.out, given.overwrite)
    if given.format == "package_default" and given.part != "model":
        raise ValueError(
            f'format="package_default" is for part="model", which a package knows; give "torch_state_dict", "torch_model" or '
            f'"safetensors" for part={given.part!r}'
        )
    found = Checkpoint.read(given.checkpoint)
    if given.model is None and given.format != "torch_model":
        module, weights = None, found.weights(given.part)
    else:
        module = part_of(found.embedding_model(given.model), given.part)
        weights = module.state_dict()
    if given.format == "safetensors":
        _write_safetensors(weights, given.out)
    elif given.format == "torch_model":
        try:
            write_torch_file(module, given.out)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise ValueError(
                f'format="torch_model": the {type(module).__name__} cannot be pickled: {error}; give "torch_state_dict"'
            ) from error
    else:
        write_torch_file(weights, given.out)


def _write_safetensors(weights: dict[str, Tensor], out: Path) -> None:
    """The format has no tensors that share memory: those are written twice."""
    content = save({name: value.detach().clone().contiguous() for name, value in weights.items()}, {"format": "pt"})
    with replacing(out) as partial:  # not `save_file`, which is vague about a full disk
        partial.write_bytes(content)
