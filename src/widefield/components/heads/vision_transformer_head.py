"""The classifier of vision transformers."""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from widefield.components.errors import WrongArgumentError
from widefield.components.heads.cls_head import ClsHead, Features
from widefield.components.heads.vectors import vectors
from widefield.components.layers.activation import ActivationConfig, build_activation_layer
from widefield.registry import MODELS


@MODELS.register_module(replaceable=True)
class VisionTransformerClsHead(ClsHead):
    """Classification of the class token by one linear layer, or by two with an activation between them.

    Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929. The last layer is initialised with zeros, so the first loss is
    ln(num_classes).

    Args:
        num_classes: Classes.
        in_channels: Width of the class token.
        hidden_dim: Width between two layers; None for one layer.
        act_cfg: Type and options of the activation between them.
        kwargs: Those of `ClsHead`.
    """

    default_init_cfg = ({"type": "Constant", "layer": "Linear", "val": 0},)

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        hidden_dim: int | None = None,
        act_cfg: ActivationConfig = {"type": "Tanh"},  # noqa: B006  # read, never written
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes <= 0:
            raise WrongArgumentError(f"num_classes={num_classes} must be a positive integer")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.hidden_dim = hidden_dim
        layers: list[tuple[str, nn.Module]] = []
        if hidden_dim is not None:
            layers = [("pre_logits", nn.Linear(in_channels, hidden_dim)), ("act", build_activation_layer(act_cfg))]
        layers += [("head", nn.Linear(in_channels if hidden_dim is None else hidden_dim, num_classes))]
        self.layers = nn.Sequential(OrderedDict(layers))

    def init_weights(self) -> None:
        """Initialise the weights; those of the hidden layer with the variance 1 / in_channels."""
        super().init_weights()
        if self.hidden_dim is not None and not self.is_pretrained:
            hidden = self.layers.get_submodule("pre_logits")
            nn.init.trunc_normal_(hidden.weight, std=self.in_channels**-0.5)  # type: ignore[arg-type]
            nn.init.zeros_(hidden.bias)  # type: ignore[arg-type]

    def pre_logits(self, feats: Features) -> Tensor:
        """The class token (N, in_channels) of the last stage, or with `hidden_dim` what the last layer gets.

        A stage may also be a pair of patch tokens and class token.
        """
        token = super().pre_logits(feats)
        token = vectors(token if isinstance(token, Tensor) else token[-1], self.in_channels)
        for layer in self.layers[:-1]:
            token = layer(token)
        return token

    def forward(self, feats: Features) -> Tensor:
        """Scores (N, num_classes)."""
        score: Tensor = self.layers[-1](self.pre_logits(feats))
        return score
