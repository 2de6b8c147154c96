"""Learning rates and weight decays that differ from one parameter to another."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from widefield.registry import Range

Factor = Annotated[float, Range(0)]
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Factors:
    """Factors of the learning rate and of the weight decay."""

    lr_mult: Factor = 1.0
    decay_mult: Factor = 1.0


@dataclass(frozen=True)
class ParameterOptions:
    """Learning rates and weight decays by kind of parameter, as in MMEngine's `paramwise_cfg`.

    Of a parameter's decay the first of these decides that knows it: custom keys, norm layers, biases, parameters of one axis.

    Args:
        norm_decay_mult: Factor of the weight decay of norm layers.
        bias_decay_mult: Of other biases.
        flat_decay_mult: Of other parameters with one axis, such as the scales of layers.
        custom_keys: Factors by parts of parameters' names, such as `{backbone: {lr_mult: 0.1}}`; of several the longest counts.
        layer_decay_rate: Factor of the learning rate from each layer to the one before it, for a `backbone` that says how deep
            its layers lie: a vision transformer.
    """

    norm_decay_mult: Factor = 1.0
    bias_decay_mult: Factor = 1.0
    flat_decay_mult: Factor = 1.0
    custom_keys: dict[str, Factors] = field(default_factory=dict)
    layer_decay_rate: Factor | None = None

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> "ParameterOptions":
        """The options that stand in a configuration."""
        keys = {key: Factors(**factors) for key, factors in (description.get("custom_keys") or {}).items()}
        return cls(**{**description, "custom_keys": keys})


def parameter_groups(
    model: nn.Module, options: ParameterOptions, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The parameters of `model` that require a gradient, in groups of one learning rate and weight decay each.

    Raises:
        ValueError: A custom key is part of no parameter's name, or the backbone does not say how deep its layers lie.
    """
    groups: dict[Factors, list[nn.Parameter]] = {}
    named = list(_named(model))
    for key in options.custom_keys:
        if not any(key in name for name, _, _ in named):
            raise ValueError(f"no parameter has the custom key {key!r} in its name")
    for name, module, parameter in named:
        if parameter.requires_grad:
            groups.setdefault(_factors(name, module, parameter, model, options), []).append(parameter)
    return [
        {"params": parameters, "lr": lr * factors.lr_mult, "weight_decay": weight_decay * factors.decay_mult}
        for factors, parameters in groups.items()
    ]


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Each parameter once, with its name and the module that holds it."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        yield name, modules[name.rpartition(".")[0]], parameter


def _factors(
    name: str, module: nn.Module, parameter: nn.Parameter, model: nn.Module, options: ParameterOptions
) -> Factors:
    layer = _layer_factor(name, model, options.layer_decay_rate)
    keys = sorted((key for key in options.custom_keys if key in name), key=len)
    if keys:
        custom = options.custom_keys[keys[-1]]
        return Factors(layer * custom.lr_mult, custom.decay_mult)
    if isinstance(module, _NORMS):
        return Factors(layer, options.norm_decay_mult)
    if name.rpartition(".")[2] == "bias":
        return Factors(layer, options.bias_decay_mult)
    return Factors(layer, options.flat_decay_mult if parameter.ndim == 1 else 1.0)


def _layer_factor(name: str, model: nn.Module, rate: float | None) -> float:
    if rate is None:
        return 1.0
    backbone: Any = getattr(model, "backbone", None)
    if not hasattr(backbone, "get_layer_depth"):
        raise ValueError(
            f"layer_decay_rate needs a backbone that says how deep its layers lie (get_layer_depth); "
            f"{type(model if backbone is None else backbone).__name__} does not"
        )
    depth, depths = backbone.get_layer_depth(name, "backbone.")
    return float(rate ** (depths - 1 - depth))
