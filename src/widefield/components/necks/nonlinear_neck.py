"""A multilayer perceptron between backbone and head."""

from collections.abc import Sequence

from torch import Tensor, nn

from widefield.components.annotations import InitConfig, NormConfig
from widefield.components.base_module import BaseModule
from widefield.components.errors import WrongArgumentError
from widefield.components.layers.norm import build_norm_layer
from widefield.components.necks.gap import GlobalAveragePooling
from widefield.components.necks.last import last_features
from widefield.registry import MODELS


@MODELS.register_module()
class NonLinearNeck(BaseModule):
    """The projection of contrastive learning: linear layers with norms, and ReLU between them, fc-bn-[relu-fc-bn]*.

    Chen et al., 2020 (SimCLR), https://arxiv.org/abs/2002.05709.

    Args:
        in_channels: Channels of the features.
        hid_channels: Channels between the layers.
        out_channels: Channels of the result.
        num_layers: Linear layers.
        with_bias: Whether all but the last have a bias.
        with_last_bn: Whether a norm follows the last.
        with_last_bn_affine: Whether that norm has weights.
        with_last_bias: Whether the last has a bias.
        with_avg_pool: Average maps over their positions first.
        norm_cfg: Type and options of the norm layers. By default they are synchronised, for the statistics of one process tell
            which images make a pair; torch does that on GPUs alone, so several processes on CPUs need BN1d.
        init_cfg: See `BaseModule`.
    """

    component_kind = "neck"

    def __init__(
        self,
        in_channels: int,
        hid_channels: int,
        out_channels: int,
        num_layers: int = 2,
        with_bias: bool = False,
        with_last_bn: bool = True,
        with_last_bn_affine: bool = True,
        with_last_bias: bool = False,
        with_avg_pool: bool = True,
        norm_cfg: NormConfig = {"type": "SyncBN"},  # noqa: B006  # read, never written
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(init_cfg)
        if num_layers < 1:
            raise WrongArgumentError(f"num_layers={num_layers} must be positive")
        self.avgpool = GlobalAveragePooling() if with_avg_pool else None
        channels = [in_channels, *[hid_channels] * (num_layers - 1), out_channels]
        self.layers = nn.Sequential()
        for k in range(num_layers):
            is_last = k == num_layers - 1
            if k:
                self.layers.append(nn.ReLU())
            self.layers.append(nn.Linear(channels[k], channels[k + 1], with_last_bias if is_last else with_bias))
            if not is_last:
                self.layers.append(build_norm_layer(norm_cfg, channels[k + 1])[1])
            elif with_last_bn:
                last_cfg = norm_cfg if with_last_bn_affine else {**norm_cfg, "affine": False}
                self.layers.append(build_norm_layer(last_cfg, out_channels)[1])

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor]:
        """Of maps (N, in_channels, H, W), or without the pooling of vectors (N, in_channels), a tuple with (N, out_channels)."""
        x = last_features(inputs)
        return (self.layers(x if self.avgpool is None else self.avgpool(x)),)
