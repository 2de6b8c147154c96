"""The contract of a model that is pretrained: four methods, no base class but `torch.nn.Module`."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

METHODS_OF_A_WRAPPER = ("get_model", "forward_features", "forward_pool", "feature_dim")


@runtime_checkable
class ModelWrapper(Protocol):
    """What `widefield.train` asks of a model, beside being a `torch.nn.Module`."""

    def get_model(self) -> nn.Module:
        """The model whose weights are exported."""

    def forward_features(self, x: Tensor) -> dict[str, Any]:
        """Features of images (B, C, H_in, W_in): a dict with "features" (B, feature_dim, H_out, W_out), and whatever else
        `forward_pool` needs.
        """

    def forward_pool(self, x: dict[str, Any]) -> dict[str, Any]:
        """Pools the whole dict of `forward_features`: a dict with "pooled_features" (B, feature_dim, H_out, W_out)."""

    def feature_dim(self) -> int:
        """Channels of "features" and of "pooled_features"."""


def missing_methods(model: object) -> list[str]:
    """The methods of a wrapper that `model` lacks."""
    return [name for name in METHODS_OF_A_WRAPPER if not callable(getattr(model, name, None))]


def is_wrapper(model: object) -> bool:
    """Whether `model` can be pretrained as it is."""
    return isinstance(model, nn.Module) and isinstance(model, ModelWrapper)
