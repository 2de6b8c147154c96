"""Necks that pool and project features."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.component import (
    ActivationConfig,
    Component,
    InitConfig,
    NormConfig,
    build_activation_layer,
    build_norm_layer,
)
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS


def last_features(inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the features of the last stage: the last of several, or the tensor itself.

    Raises:
        TypeError: The inputs are neither tensors nor a tensor.
    """
    last = inputs[-1] if isinstance(inputs, (tuple, list)) and inputs else inputs
    if not isinstance(last, Tensor):
        raise TypeError(f"the inputs of a neck are a tuple of tensors or a tensor, not {type(inputs).__name__}")
    return last


@MODELS.register_module(replaceable=True)
class GlobalAveragePooling(Component):
    """The average of each channel over all positions.

    Args:
        dim: Axes of position: 1, 2 or 3.
    """

    component_kind = "neck"

    def __init__(self, dim: Literal[1, 2, 3] = 2) -> None:
        super().__init__()
        if dim not in (1, 2, 3):
            raise WrongArgumentError(f"dim={dim} is not one of 1, 2, 3")
        self.dim = dim

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Return the averages (N, C) of a map (N, C, ...); of a tuple of maps a tuple."""
        if isinstance(inputs, tuple):
            return tuple(self._pool(one) for one in inputs)
        if isinstance(inputs, Tensor):
            return self._pool(inputs)
        raise TypeError(f"the inputs of a neck are a tuple of tensors or a tensor, not a {type(inputs).__name__}")

    def _pool(self, one: Tensor) -> Tensor:
        if one.ndim != self.dim + 2:
            raise ValueError(f"a map has the shape {tuple(one.shape)}; with dim={self.dim} it has {self.dim + 2} axes")
        return one.flatten(2).mean(2)


@MODELS.register_module()
class GeneralizedMeanPooling(Component):
    """The generalised mean of each channel over all positions, (mean of x^p)^(1/p): 1 averages, and large p take the maximum.

    Radenovic et al., 2017, https://arxiv.org/abs/1711.02512.

    Args:
        p: The exponent at first, at least 1.
        eps: Values below it count as it.
        clamp: False takes values as they are; of negative ones most powers are no number.
        p_trainable: Whether the exponent is trained.
    """

    component_kind = "neck"

    def __init__(self, p: float = 3.0, eps: float = 1e-6, clamp: bool = True, p_trainable: bool = True) -> None:
        super().__init__()
        if p < 1:
            raise WrongArgumentError(f"p={p} must be at least 1")
        self.p = nn.Parameter(torch.ones(1) * p, requires_grad=p_trainable)
        self.eps = eps
        self.clamp = clamp

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Return the means (N, C) of a map (N, C, H, W); of a tuple of maps a tuple."""
        if isinstance(inputs, tuple):
            return tuple(self._pool(one) for one in inputs)
        return self._pool(last_features(inputs))

    def _pool(self, one: Tensor) -> Tensor:
        x = one.clamp(min=self.eps) if self.clamp else one
        return x.pow(self.p).mean((2, 3)).pow(1 / self.p)


@MODELS.register_module()
class ClsBatchNormNeck(Component):
    """Batch norm of features, before the head of a linear probe of a vision transformer.

    He et al., 2021 (MAE), https://arxiv.org/abs/2111.06377, appendix A.

    Args:
        input_features: Width of the features.
        affine: Whether the norm has weights.
        eps: Added to the variance.
        init_cfg: See `Component`.
    """

    component_kind = "neck"

    def __init__(
        self, input_features: int, affine: bool = False, eps: float = 1e-6, init_cfg: InitConfig = None
    ) -> None:
        super().__init__(init_cfg)
        self.bn = nn.BatchNorm1d(input_features, affine=affine, eps=eps)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return a tuple of normalised features, each (N, input_features)."""
        return tuple(self.bn(one) for one in inputs)


@MODELS.register_module()
class LinearNeck(Component):
    """A linear layer, a norm and an activation, of the features of the last stage.

    Args:
        in_channels: Channels of the features.
        out_channels: Channels of the result.
        gap_dim: Axes of position, 1, 2 or 3, that are averaged first; 0 averages nothing.
        norm_cfg: Type and options of the norm layer; None for none.
        act_cfg: Type and options of the activation; None for none.
        init_cfg: See `Component`.
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
        """Return a tuple with (..., out_channels) of features (..., in_channels), or with `gap_dim` of maps (N, in_channels, ...).

        A norm of batches sees each token of (B, L, in_channels) as one more vector.
        """
        x = self.fc(self.gap(last_features(inputs)))
        return (self.act(self.norm(x.flatten(0, -2)).view(x.shape)),)


@MODELS.register_module()
class NonLinearNeck(Component):
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
        init_cfg: See `Component`.
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
        """Return a tuple with (N, out_channels) of maps (N, in_channels, H, W), or without pooling of vectors (N, in_channels)."""
        x = last_features(inputs)
        return (self.layers(x if self.avgpool is None else self.avgpool(x)),)


@MODELS.register_module()
class MoCoV2Neck(Component):
    """The projection of MoCo v2: two linear layers with a ReLU between them.

    Chen et al., 2020, https://arxiv.org/abs/2003.04297.

    Args:
        in_channels: Channels of the features.
        hid_channels: Channels between the layers.
        out_channels: Channels of the result.
        with_avg_pool: Average maps over their positions first.
        init_cfg: See `Component`.
    """

    component_kind = "neck"

    def __init__(
        self,
        in_channels: int,
        hid_channels: int,
        out_channels: int,
        with_avg_pool: bool = True,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(init_cfg)
        self.avgpool = GlobalAveragePooling() if with_avg_pool else None
        self.mlp = nn.Sequential(nn.Linear(in_channels, hid_channels), nn.ReLU(), nn.Linear(hid_channels, out_channels))

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor]:
        """Return a tuple with (N, out_channels) of maps (N, in_channels, H, W), or without pooling of vectors (N, in_channels)."""
        x = last_features(inputs)
        return (self.mlp(x if self.avgpool is None else self.avgpool(x)),)


@MODELS.register_module()
class SwAVNeck(Component):
    """The projection of SwAV: linear layer, norm, ReLU, linear layer, and vectors of length 1, for crops of several sizes.

    Caron et al., 2020, https://arxiv.org/abs/2006.09882.

    Args:
        in_channels: Channels of the features.
        hid_channels: Channels between the layers; 0 for one linear layer.
        out_channels: Channels of the result; 0 for no layer.
        with_avg_pool: Average maps over their positions first.
        with_l2norm: Scale the results to length 1.
        norm_cfg: Type and options of the norm layer, see `NonLinearNeck`.
        init_cfg: See `Component`.
    """

    component_kind = "neck"

    def __init__(
        self,
        in_channels: int,
        hid_channels: int,
        out_channels: int,
        with_avg_pool: bool = True,
        with_l2norm: bool = True,
        norm_cfg: NormConfig = {"type": "SyncBN"},  # noqa: B006  # read, never written
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(init_cfg)
        self.avgpool = GlobalAveragePooling() if with_avg_pool else None
        self.with_l2norm = with_l2norm
        if out_channels == 0:
            self.projection_neck: nn.Module = nn.Identity()
        elif hid_channels == 0:
            self.projection_neck = nn.Linear(in_channels, out_channels)
        else:
            self.projection_neck = nn.Sequential(
                nn.Linear(in_channels, hid_channels),
                build_norm_layer(norm_cfg, hid_channels)[1],
                nn.ReLU(),
                nn.Linear(hid_channels, out_channels),
            )

    def forward(self, inputs: Sequence[Sequence[Tensor]]) -> Tensor:
        """Return projections (sum of N, out_channels) of what the backbone gives for each size of crops, a tuple of maps."""
        maps = [last_features(one) for one in inputs]
        x = torch.cat(maps if self.avgpool is None else [self.avgpool(one) for one in maps])
        x = self.projection_neck(x)
        return functional.normalize(x, dim=1) if self.with_l2norm else x
