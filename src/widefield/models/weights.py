"""Weights of networks from files."""

import logging
from pathlib import Path

from torch import Tensor, nn

from widefield.components.checkpoints import read_weights
from widefield.components.key_maps import plain_names

_log = logging.getLogger(__name__)
HEADS = {"fc", "head", "heads", "head_dist", "classifier", "dino_head", "ibot_head"}
"""Names of parts that stand on top of a network of timm, torchvision or DINO."""
_LINEAR_HEADS = ("head.fc", "head.layers.head")
"""Names of the last layer in models of components: of a LinearClsHead and of a VisionTransformerClsHead."""


def load_weights(net: nn.Module, path: str | Path) -> None:
    """Load a state dict into `net`, all keys, but for those of a classifier.

    The file is `.safetensors`, or what `torch.save` wrote: a state dict, or a dict that holds one as `state_dict` or
    `model`. It is read with `weights_only=True`, so it can execute nothing. Where the file has no weights for the last linear
    layer, or others in number, that keeps its random weights; where it has those of a linear layer that the network lacks, or
    of parts that are called head or the like (`HEADS`), they are left out. Either is logged. Of a model of MMPretrain, or a
    component model of ours, the weights of the backbone are taken, and those of a linear head.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no state dict, or one of another network.
    """
    load_state(net, read_weights(Path(path)), Path(path))


def load_state(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load the state dict of the file `path` into `net`, as `load_weights` does.

    Raises:
        ValueError: It is of another network.
    """
    own = net.state_dict()
    classifier = _classifier_keys(net)
    if any(key.startswith("backbone.") for key in state.keys() - own.keys()):
        state = _of_model(net, state, classifier, path)
    fresh = [key for key in classifier if key not in state or state[key].shape != own[key].shape]
    state.update({key: own[key] for key in fresh})
    missing = sorted(own.keys() - state.keys())
    surplus = sorted(state.keys() - own.keys())
    left_out: list[str] = []
    if surplus and (_is_linear_layer(surplus, state) or all(HEADS & {*key.split(".")[:-1]} for key in surplus)):
        left_out, surplus = surplus, []
        state = {key: state[key] for key in own if key in state}
    shapes = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
    for what, keys in (("lacks", missing), ("has, unlike the network,", surplus), ("has in another shape", shapes)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(
                f"{path} is not for this network ({type(net).__name__}): it {what} {', '.join(keys[:3])}{more}; "
                f"give weights of the same architecture{_exported_beside(path)}"
            )
    net.load_state_dict(state)
    if fresh:
        _log.info("%s has no classifier of these classes: %s stays random", path.name, ", ".join(fresh))
    if left_out:
        _log.info("%s has a classifier, which is left out: %s", path.name, ", ".join(left_out))


def _of_model(net: nn.Module, state: dict[str, Tensor], classifier: list[str], path: Path) -> dict[str, Tensor]:
    """Return those of the weights of a model with `backbone` and `head` that `net` has, by its names; the rest is logged."""
    found = plain_names(net, state)
    for key in classifier:
        for head in _LINEAR_HEADS:
            value = state.get(f"{head}.{key.rpartition('.')[2]}")
            found |= {} if value is None else {key: value}
    left = sorted({".".join(key.split(".")[:2]) for key in state if not key.startswith(("backbone.", *_LINEAR_HEADS))})
    if left:
        _log.info("%s is of a model with more than a backbone, which is left out: %s", path.name, ", ".join(left))
    return found


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
