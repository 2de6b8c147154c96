"""MobileNetV3."""

from collections.abc import Sequence
from typing import Literal

from torch import nn
from torchvision import models

from widefield.components.annotations import InitConfig, NormConfig
from widefield.components.backbones.stages import SequentialBackbone, check_frozen_stages
from widefield.components.backbones.streaming import StreamingOptions
from widefield.components.errors import WrongArgumentError
from widefield.components.layers.norm import build_norm_layer
from widefield.registry import MODELS, suggestion

_ARCHITECTURES = {
    "small": (models.mobilenet_v3_small, 1.0),
    "small_075": (models.mobilenet_v3_small, 0.75),
    "small_050": (models.mobilenet_v3_small, 0.5),
    "large": (models.mobilenet_v3_large, 1.0),
}


@MODELS.register_module()
class MobileNetV3(SequentialBackbone):
    """MobileNetV3: inverted residuals with squeeze-and-excitation and hard swish.

    Howard et al., 2019, https://arxiv.org/abs/1905.02244. The layers are torchvision's, whose checkpoints load.

    Args:
        arch: The network; `small_075` and `small_050` have that share of the channels.
        out_indices: What is returned: maps of the stem (0), of the blocks, and of the last convolution (12 of the small ones, 16 of
            the large one), which is what None returns.
        frozen_stages: The stem and this many blocks behind it do not train; -1 freezes nothing.
        norm_cfg: Type and options of the norm layers.
        norm_eval: Batch norms stay in evaluation mode; their affine weights train.
        streaming: See `StreamableBackbone`.
        init_cfg: See `BaseModule`; None keeps what torchvision initialises with.
    """

    def __init__(
        self,
        arch: Literal["small", "small_075", "small_050", "large"] = "small",
        out_indices: int | Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_cfg: NormConfig = {"type": "BN", "eps": 0.001, "momentum": 0.01},  # noqa: B006  # read, never written
        norm_eval: bool = False,
        streaming: StreamingOptions | None = None,
        init_cfg: InitConfig = None,
    ) -> None:
        if arch not in _ARCHITECTURES:
            raise WrongArgumentError(f"arch={arch!r} is unknown; {suggestion(str(arch), _ARCHITECTURES)}")

        def norm(channels: int) -> nn.Module:
            return build_norm_layer(norm_cfg, channels)[1]

        make, width = _ARCHITECTURES[arch]
        features = make(weights=None, num_classes=1, width_mult=width, norm_layer=norm).features
        check_frozen_stages(frozen_stages, -1, len(features) - 1)
        ends = range(1, len(features) + 1)
        out_indices = -1 if out_indices is None else out_indices
        super().__init__(features, ends, out_indices, frozen_stages + 1, norm_eval, streaming, init_cfg)
        self.arch = arch
        self.frozen_stages = frozen_stages
