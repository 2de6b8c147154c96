"""Weight initialisation by description, `init_cfg`: `{type: Kaiming, layer: Conv2d}`."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from widefield.components.checkpoints import locate, read_weights
from widefield.components.key_maps import AdaptsWeights, adapted
from widefield.errors import WrongArgumentError
from widefield.registry import Registry, suggestion

_log = logging.getLogger(__name__)
INITIALIZERS = Registry("initialisation")
_LAYERS = {owner.__name__ for kind in vars(nn).values() if isinstance(kind, type) for owner in kind.__mro__}
"""Names of torch's layers and of the classes that they inherit from, which a model need not have."""
_FANS = 2
"""Fewest axes of a weight that has a fan-in."""


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """Sets weights and biases of layers.

    Args:
        bias: What biases become.
        layer: Class names; a layer is set if its class, or a class that it inherits from, has one of them. None sets every layer,
            or, where there is an `override`, none beside that.
        override: One part by name, or several, set differently: `{name: conv1, type: Constant, val: 0}`; without a type, by the
            arguments of this description.
    """

    bias: float = 0.0
    layer: str | Sequence[str] | None = None
    override: dict[str, Any] | list[dict[str, Any]] | None = None

    def __call__(self, module: nn.Module) -> None:
        """Set the layers of `module`."""
        names = {self.layer} if isinstance(self.layer, str) else set(self.layer or ())
        if names or not self.override:
            _warn_of_unknown(names, module)
            for part in module.modules():
                if not names or names & {owner.__name__ for owner in type(part).__mro__}:
                    self._set(part, named=bool(names))
        for override in [self.override] if isinstance(self.override, dict) else self.override or []:
            self._set_part(module, dict(override))

    def fill(self, weight: Tensor) -> None:
        """Set a weight."""
        raise NotImplementedError

    needs_fans = False
    """True if `fill` needs a weight of two axes or more."""

    def _set(self, part: nn.Module, named: bool) -> None:
        weight, bias = getattr(part, "weight", None), getattr(part, "bias", None)
        if isinstance(weight, Tensor) and (named or not self.needs_fans or weight.ndim >= _FANS):
            self.fill(weight)
            if isinstance(bias, Tensor):
                nn.init.constant_(bias, self.bias)

    def _set_part(self, module: nn.Module, override: dict[str, Any]) -> None:
        name = override.pop("name", None)
        if not isinstance(name, str) or not hasattr(module, name):
            parts = ", ".join(name for name, _ in module.named_children())
            raise WrongArgumentError(f"override of {name!r}: give the name of a part, one of {parts}")
        part = getattr(module, name)
        if "type" in override:
            INITIALIZERS.build(override)(part)
            return
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        type(self)(**{**own, "layer": None, "override": None, **override})(part)


def _warn_of_unknown(names: set[str], module: nn.Module) -> None:
    """Warn of class names that neither a part of `module` has nor a layer of torch: they set nothing, so they may be slips."""
    own = {owner.__name__ for part in module.modules() for owner in type(part).__mro__}
    for name in sorted(names - own - _LAYERS):
        _log.warning(
            "init_cfg: no layer of %s is a %s; %s", type(module).__name__, name, suggestion(name, own | _LAYERS)
        )


@INITIALIZERS.register_module()
@dataclass(frozen=True, kw_only=True)
class Constant(Initializer):
    """Weights become `val`."""

    val: float

    def fill(self, weight: Tensor) -> None:
        nn.init.constant_(weight, self.val)


@INITIALIZERS.register_module()
@dataclass(frozen=True, kw_only=True)
class Xavier(Initializer):
    """Variance by fan-in and fan-out (Glorot and Bengio, 2010)."""

    gain: float = 1.0
    distribution: Literal["normal", "uniform"] = "normal"
    needs_fans = True

    def fill(self, weight: Tensor) -> None:
        (nn.init.xavier_normal_ if self.distribution == "normal" else nn.init.xavier_uniform_)(weight, self.gain)


@INITIALIZERS.register_module()
@dataclass(frozen=True, kw_only=True)
class Normal(Initializer):
    """A normal distribution."""

    mean: float = 0.0
    std: float = 1.0

    def fill(self, weight: Tensor) -> None:
        nn.init.normal_(weight, self.mean, self.std)


@INITIALIZERS.register_module()
@dataclass(frozen=True, kw_only=True)
class TruncNormal(Initializer):
    """A normal distribution, cut off at `a` and `b`."""

    mean: float = 0.0
    std: float = 1.0
    a: float = -2.0
    b: float = 2.0

    def fill(self, weight: Tensor) -> None:
        nn.init.trunc_normal_(weight, self.mean, self.std, self.a, self.b)


@INITIALIZERS.register_module()
@dataclass(frozen=True, kw_only=True)
class Uniform(Initializer):
    """A uniform distribution over [a, b)."""

    a: float = 0.0
    b: float = 1.0

    def fill(self, weight: Tensor) -> None:
        nn.init.uniform_(weight, self.a, self.b)


@INITIALIZERS.register_module()
@dataclass(frozen=True, kw_only=True)
class Kaiming(Initializer):
    """Variance by one of the fans and the nonlinearity that follows (He et al., 2015)."""

    a: float = 0.0
    mode: Literal["fan_in", "fan_out"] = "fan_out"
    nonlinearity: str = "relu"
    distribution: Literal["normal", "uniform"] = "normal"
    needs_fans = True

    def fill(self, weight: Tensor) -> None:
        fill = nn.init.kaiming_normal_ if self.distribution == "normal" else nn.init.kaiming_uniform_
        fill(weight, self.a, self.mode, self.nonlinearity)  # type: ignore[arg-type]  # any of calculate_gain


@INITIALIZERS.register_module()
@dataclass(frozen=True, kw_only=True)
class Caffe2Xavier(Initializer):
    """Uniform in plus or minus sqrt(3 / fan-in), the XavierFill of Caffe2."""

    needs_fans = True

    def fill(self, weight: Tensor) -> None:
        nn.init.kaiming_uniform_(weight, 1.0, "fan_in", "leaky_relu")


@INITIALIZERS.register_module()
@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights of a checkpoint; they win over all other initialisation.

    Names may be those of MMPretrain, and for some networks those of timm and torchvision, see `widefield.components.key_maps`.

    Args:
        checkpoint: A file with tensors and plain data (.pth, .ckpt, .safetensors), an address, or a name such as
            `torchvision://resnet50` or `timm/resnet50`, see `widefield.components.checkpoints.read_weights`.
        prefix: Take only keys that begin so, and strip it: `backbone.`; a dot at the end is added.
        map_location: Where tensors are read to.
    """

    checkpoint: str
    prefix: str | None = None
    map_location: str = "cpu"

    def __call__(self, module: nn.Module) -> None:
        """Load the weights into `module`; what the file lacks, has in excess or has in another shape is logged.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: It cannot be fetched.
            WrongArgumentError: It has none of the module's weights, or those of another backbone.
        """
        weights = self._selected(read_weights(self.checkpoint, self.map_location))
        found = self._compared(module, weights)
        module.load_state_dict({key: found.weights[key] for key in found.fitting}, strict=False)
        for what, keys in (
            ("lacks", found.missing),
            ("has in excess", found.surplus),
            ("has in another shape, so they are not loaded", found.other),
        ):
            if keys:
                _log.warning("%s %s: %s", self.checkpoint, what, ", ".join(keys))

    def check(self, module: nn.Module) -> None:
        """Compare the weights with `module`, and load nothing; of what would have to be fetched only the name is checked.

        Raises:
            FileNotFoundError, WrongArgumentError: As for a call.
        """
        if Path(locate(self.checkpoint)).is_file():
            self._compared(module, self._selected(read_weights(self.checkpoint, "meta")))

    def _selected(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.prefix is None:
            return weights
        start = self.prefix.removesuffix(".") + "."
        found = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
        if not found:
            raise WrongArgumentError(
                f"{self.checkpoint}: no key begins with {start!r}; they begin with {_few(dict.fromkeys(map(_first, weights)))}"
            )
        return found

    def _compared(self, module: nn.Module, weights: dict[str, Tensor]) -> "_Comparison":
        found = _Comparison.of(module, weights)
        reason = found.misfit(module) if found.fitting else _why_nothing_fits(module, weights, found)
        if reason:
            raise WrongArgumentError(f"{self.checkpoint} {reason}")
        return found


_OTHER_SHAPES = 2
"""Weights of a backbone that may have another shape: the first convolution's for other channels, and an embedding of positions."""
_MISSING = 0.25
"""Share of a backbone's weights that a checkpoint may lack: norm layers of outputs that it was not trained with."""
_SHOWN = 3


@dataclass(frozen=True)
class _Comparison:
    """Weights, by the names of a module, and which of them it has, by their shapes too."""

    weights: dict[str, Tensor]
    fitting: list[str]
    other: list[str]
    missing: list[str]
    surplus: list[str]

    @classmethod
    def of(cls, module: nn.Module, weights: dict[str, Tensor]) -> "_Comparison":
        found, own = adapted(module, weights), module.state_dict()
        common = [key for key in own if key in found]
        fitting = [key for key in common if found[key].shape == own[key].shape]
        return cls(
            weights=found,
            fitting=fitting,
            other=[key for key in common if found[key].shape != own[key].shape],
            missing=[key for key in own if key not in found],
            surplus=[key for key in found if key not in own],
        )

    def misfit(self, module: nn.Module) -> str:
        """Return why these are not the weights of the backbone that `module` has or is, "" if they may be."""
        start = "" if getattr(module, "component_kind", "") == "backbone" else "backbone."
        backbone = module if not start else getattr(module, "backbone", None)
        fitting, other, missing, deeper = (
            [key for key in keys if key.startswith(start) and not key.endswith("num_batches_tracked")]
            for keys in (
                self.fitting,
                self.other,
                self.missing,
                [key for key in self.surplus if _is_deeper(module, key)],
            )
        )
        if backbone is None or not fitting + other:
            return ""
        own, name = module.state_dict(), type(backbone).__name__
        if len(other) > _OTHER_SHAPES:
            first = other[0]
            what = f"{first} has the shape {tuple(self.weights[first].shape)}, expected {tuple(own[first].shape)}"
            what += f", and {len(other) - 1} more have another"
        elif len(missing) > _MISSING * len(fitting + other + missing):
            what = f"it lacks {len(missing)} of {len(fitting + other + missing)} weights, {_few(missing)}"
        elif deeper:
            what = f"it has more layers, {_few(deeper)}"
        else:
            return ""
        return f"is not of this {name}: {what}; give weights of this architecture, or the architecture of the weights"


def _why_nothing_fits(module: nn.Module, weights: dict[str, Tensor], found: _Comparison) -> str:
    """Return what to do about weights of which `module` has none."""
    begin = f"has no weight of {type(module).__name__}: "
    if found.other:
        own, first = module.state_dict(), found.other[0]
        return f"{begin}{first} has the shape {tuple(found.weights[first].shape)}, expected {tuple(own[first].shape)}"
    for start in dict.fromkeys(map(_first, weights)):
        inside = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
        if _Comparison.of(module, inside).fitting:
            return f"{begin}its names begin with {start!r}; give prefix: {start}"
    for name, part in module.named_children():
        if isinstance(part, AdaptsWeights) and _Comparison.of(part, weights).fitting:
            return f"{begin}it has those of the {name} alone; give it as the init_cfg of the {name}"
    return f"{begin}it has {_few(weights)}, and the {type(module).__name__} has {_few(found.missing)}"


def _is_deeper(module: nn.Module, key: str) -> bool:
    """Return True if a weight is of one more in a row of numbered parts of `module`."""
    for name in key.split(".")[:-1]:
        part = module._modules.get(name)
        if part is None:
            return name.isdigit() and "0" in module._modules
        module = part
    return False


def _first(key: str) -> str:
    return key.partition(".")[0] + "."


def _few(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
