"""Weight initialisation by description, `init_cfg`: `{type: Kaiming, layer: Conv2d}`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor, nn

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

    Args:
        checkpoint: A file with tensors and plain data (.pth, .ckpt, .safetensors), or its address.
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
            WrongArgumentError: It has none of the module's weights.
        """
        weights = self._read()
        if self.prefix is not None:
            start = self.prefix.removesuffix(".") + "."
            weights = {key.removeprefix(start): value for key, value in weights.items() if key.startswith(start)}
        own = module.state_dict()
        other = [key for key in weights if key in own and weights[key].shape != own[key].shape]
        if not set(weights) & set(own) - set(other):
            some = ", ".join(list(weights)[:3])
            hint = f"it has {some}, ..." if weights else f"no key begins with {self.prefix!r}"
            raise WrongArgumentError(
                f"{self.checkpoint} has no weight of {type(module).__name__}: {hint}; "
                + ("their shapes are others" if other else "check prefix")
            )
        result = module.load_state_dict({key: weights[key] for key in weights if key not in other}, strict=False)
        missing = [key for key in result.missing_keys if key not in other]
        for what, keys in (
            ("lacks", missing),
            ("has in excess", result.unexpected_keys),
            ("has in another shape, so they are not loaded", other),
        ):
            if keys:
                _log.warning("%s %s: %s", self.checkpoint, what, ", ".join(keys))

    def _read(self) -> dict[str, Tensor]:
        if "://" in self.checkpoint:
            found = torch.hub.load_state_dict_from_url(
                self.checkpoint, map_location=self.map_location, weights_only=True
            )
        elif not Path(self.checkpoint).is_file():
            raise FileNotFoundError(f"the checkpoint {self.checkpoint} does not exist")
        elif self.checkpoint.endswith(".safetensors"):
            from safetensors.torch import load_file

            found = load_file(self.checkpoint, device=self.map_location)
        else:
            try:
                found = torch.load(self.checkpoint, map_location=self.map_location, weights_only=True)
            except (UnpicklingError, EOFError, RuntimeError) as error:
                raise WrongArgumentError(
                    f"{self.checkpoint} cannot be read as tensors and plain data saved by torch ({type(error).__name__}); it is "
                    "another kind of file, truncated, or a whole model: save model.state_dict() instead"
                ) from error
        if not isinstance(found, dict):
            raise WrongArgumentError(f"{self.checkpoint} holds a {type(found).__name__}, expected weights by name")
        for key in ("state_dict", "model"):
            if isinstance(found, dict) and isinstance(found.get(key), dict):
                found = found[key]
        return {key.removeprefix("module."): value for key, value in found.items()}
