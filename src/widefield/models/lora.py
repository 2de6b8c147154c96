"""Low-rank adapters in a network, by peft: added, written alone, or merged into its weights."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from widefield.errors import MissingExtraError, WrongArgumentError
from widefield.writing import write_safetensors

_ATTENTION = ("qkv", "q", "k", "v", "q_proj", "k_proj", "v_proj", "proj", "out_proj")
_PREFIX = "base_model.model."
"""The beginning of the names of weights in files of peft."""


def add_adapters(net: nn.Module, rank: int) -> None:
    """Add adapters to the linear layers of all attention in `net`, or to all linear layers where there is none; freeze the rest.

    A layer's weight becomes W + B A, with A (rank, inputs) random and B (outputs, rank) zero at first: Hu et al., 2021,
    https://arxiv.org/abs/2106.09685, with alpha = rank.

    Raises:
        MissingExtraError: peft is not installed.
        WrongArgumentError: The network has no linear layer, or the rank is not positive.
    """
    if rank < 1:
        raise WrongArgumentError(f"lora={rank} must be a positive rank")
    linear = [name for name, part in net.named_modules() if isinstance(part, nn.Linear)]
    chosen = [name for name in linear if name.rpartition(".")[2] in _ATTENTION] or linear
    if not chosen:
        raise WrongArgumentError(f"lora={rank}: {type(net).__name__} has no linear layer to adapt; leave lora out")
    peft = _peft()
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen), net)


def has_adapters(net: nn.Module) -> bool:
    """Return True if the network has adapters."""
    return any(hasattr(part, "lora_A") for part in net.modules())


def merged(net: nn.Module) -> nn.Module:
    """Return a copy of `net` without adapters, with what they add in its weights; under the names that it had before them."""
    net = copy.deepcopy(net)
    for name, part in list(net.named_modules()):
        if hasattr(part, "lora_A"):
            part.merge()
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, part.get_base_layer())
    return net


def write_adapters(net: nn.Module, folder: Path) -> None:
    """Write the adapters alone to a folder, as `peft.PeftModel.from_pretrained(net, folder)` reads them."""
    peft = _peft()
    weights = {_PREFIX + name: value for name, value in peft.get_peft_model_state_dict(net).items()}
    configs: Any = net.peft_config
    config = copy.deepcopy(configs["default"])
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    write_safetensors(weights, folder / "adapter_model.safetensors")


def _peft() -> Any:
    try:
        import peft  # seconds to import
    except ModuleNotFoundError as error:
        raise MissingExtraError("lora", "peft", "lora") from error
    return peft
