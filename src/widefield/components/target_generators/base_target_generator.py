"""Base classes of target generators: they never learn, and those that were trained need their weights."""

from typing import Any

import torch
from torch import Tensor

from widefield.components.component import Component, InitConfig
from widefield.errors import WrongArgumentError


class BaseTargetGenerator(Component):
    """Makes targets from images, and never learns: it stays in evaluation mode, and what it computes has no gradients.

    A constructor with parts of its own ends with `self.train()`, which freezes them.
    """

    component_kind = "target_generator"

    def train(self, mode: bool = True) -> Any:
        """Set evaluation mode, whatever the mode, and freeze all parameters."""
        super().train(False)
        return self.requires_grad_(False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The targets, without gradients."""
        with torch.no_grad():
            return super().__call__(*args, **kwargs)


class PretrainedTargetGenerator(BaseTargetGenerator):
    """A target generator that was trained before: it refuses to make targets with weights that nobody loaded.

    Args:
        init_cfg: `{type: Pretrained, checkpoint: FILE}`.
        allow_random_weights: Do without a checkpoint; the targets mean nothing then.

    Raises:
        WrongArgumentError: No checkpoint is given, and random weights are not allowed.
    """

    def __init__(self, init_cfg: InitConfig = None, allow_random_weights: bool = False) -> None:
        super().__init__(init_cfg)
        self.allow_random_weights = allow_random_weights
        self._missing: set[str] | None = None
        if not (allow_random_weights or self.is_pretrained):
            raise WrongArgumentError(
                f"{type(self).__name__} makes no sense with random weights; give "
                f"init_cfg={{type: Pretrained, checkpoint: FILE}}, or allow_random_weights=True to try things out"
            )

    def init_weights(self) -> None:
        """Initialise the weights.

        Raises:
            WrongArgumentError: The checkpoint lacks some of them.
        """
        super().init_weights()
        if not self.allow_random_weights:
            self._check_weights()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The targets, without gradients.

        Raises:
            WrongArgumentError: Weights were not loaded.
        """
        if not self.allow_random_weights:
            self._check_weights()
        return super().__call__(*args, **kwargs)

    def _check_weights(self) -> None:
        name = type(self).__name__
        if self._missing is None:
            raise WrongArgumentError(f"the weights of {name} were not loaded; call init_weights() or load_state_dict()")
        if self._missing:
            few = sorted(self._missing)[:3]
            more = f" and {len(self._missing) - len(few)} more" if len(self._missing) > len(few) else ""
            raise WrongArgumentError(f"what was loaded lacks weights of {name}: {', '.join(few)}{more}; check the file")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Load, and note what has not been loaded so far."""
        missing = {name for name in self.state_dict() if prefix + name not in state_dict}
        self._missing = missing if self._missing is None else self._missing & missing
        super()._load_from_state_dict(state_dict, prefix, *args)
