"""Weights and checkpoints from files, read so that they can execute nothing."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_log = logging.getLogger(__name__)


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Load a state dict into `net`, all keys, but for those of a classifier.

    The file is `.safetensors`, or what `torch.save` wrote: a state dict, or a dict that holds one as `state_dict` or
    `model`. It is read with `weights_only=True`, so it can execute nothing. Where the file has no weights for the last linear
    layer, or others in number, that keeps its random weights; where it has those of a linear layer that the network lacks,
    they are left out. Either is logged.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no state dict, or one of another network.
    """
    path = Path(path)
    state = _read(path)
    own = net.state_dict()
    classifier = _classifier_keys(net)
    if fresh := [key for key in classifier if key not in state or state[key].shape != own[key].shape]:
        state.update({key: own[key] for key in fresh})
        _log.info("%s has no classifier of these classes: %s stays random", path.name, ", ".join(fresh))
    missing = sorted(own.keys() - state.keys())
    surplus = sorted(state.keys() - own.keys())
    if _is_linear_layer(surplus, state):
        _log.info("%s has a classifier, which is left out: %s", path.name, ", ".join(surplus))
        state, surplus = {key: state[key] for key in own if key in state}, []
    shapes = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    for what, keys in (("lacks", missing), ("has, unlike the network,", surplus), ("has in another shape", shapes)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"{path} is not for this network ({type(net).__name__}): it {what} {', '.join(keys[:3])}{more}; "
                f"give weights of the same architecture{_exported_beside(path)}"
            )
    net.load_state_dict(state)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors" and path.is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} cannot be read as safetensors ({error}); it is another file, or truncated"
            ) from error
    content = read_torch_file(path)
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict; save `model.state_dict()` with torch.save or safetensors")
    return dict(content)


def _is_linear_layer(keys: list[str], state: dict[str, Tensor]) -> bool:
    layers = {key.rpartition(".")[0] for key in keys}
    return len(layers) == 1 and sorted(state[key].ndim for key in keys) in ([2], [1, 2])


def _exported_beside(path: Path) -> str:
    """Say where the weights of a run of `pretrain` are, if `path` is one of its checkpoints; else nothing."""
    exported = path.parent.parent / "exported_models" / "exported_last.pt"
    return f", not the checkpoint of a run: {exported} holds its weights" if exported.is_file() else ""


def _classifier_keys(net: nn.Module) -> list[str]:
    """Keys of the last linear layer."""
    linear = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    return [key for key in net.state_dict() if linear and key.rpartition(".")[0] == linear[-1]]


def read_torch_file(path: Path) -> Any:
    """The content of a file of tensors and plain data, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, or it is truncated, or it holds other objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the unpickler raises on a foreign file is anything: KeyError, EOFError, ...
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as tensors and plain data saved by torch ({type(error).__name__}: {reason}); "
            "it is another kind of file, or truncated"
        ) from error
