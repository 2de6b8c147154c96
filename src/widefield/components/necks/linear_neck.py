"""A linear layer between backbone and head."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from widefield.components.annotations import InitConfig, NormConfig
from widefield.components.base_module import BaseModule
from widefield.components.errors import WrongArgumentError
from widefield.components.layers.activation import ActivationConfig, build_activation_layer
from widefield.components.layers.norm import build_norm_layer
from widefield.components.necks.gap import GlobalAveragePooling
from widefield.components.necks.last import last_features
from widefield.registry import MODELS


@MODELS.register_module()
class LinearNeck(BaseModule):
    """A linear layer, a norm and an activation, of the features of the last stage.

    Args:
        in_channels: Channels of the features.
        out_channels: Channels of the result.
        gap_dim: Axes of position, 1, 2 or 3, that are averaged first; 0 averages nothing.
        norm_cfg: Type and options of the norm layer; None for none.
        act_cfg: Type and options of the activation; None for none.
        init_cfg: See `BaseModule`.
    """

    component_kind = "neck"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        gap_dim: Literal[0, 1, 2, 3] = 0,
        norm_cfg: NormConfig | None = {"type": "BN1d"},  # noqa: B006  # read, never written
        act_cfg: ActivationConfig = None,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(init_cfg)
        if gap_dim not in (0, 1, 2, 3):
            raise WrongArgumentError(f"gap_dim={gap_dim} is not one of 0, 1, 2, 3")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.gap = GlobalAveragePooling(gap_dim) if gap_dim else nn.Identity()
        self.fc = nn.Linear(in_channels, out_channels)
        self.norm = nn.Identity() if norm_cfg is None else build_norm_layer(norm_cfg, out_channels)[1]
        self.act = build_activation_layer(act_cfg)

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor]:
        """Of features (..., in_channels), or with `gap_dim` of maps (N, in_channels, ...), a tuple with (..., out_channels).

        A norm of batches sees each token of (B, L, in_channels) as one more vector.
        """
        x = self.fc(self.gap(last_features(inputs)))
        return (self.act(self.norm(x.flatten(0, -2)).view(x.shape)),)
