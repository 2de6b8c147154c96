"""EfficientNet."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torchvision import models

from widefield.components.annotations import InitConfig, NormConfig
from widefield.components.backbones.stages import SequentialBackbone, check_drop_path_rate, check_frozen_stages
from widefield.components.backbones.streaming import StreamingOptions
from widefield.components.errors import WrongArgumentError
from widefield.components.layers.norm import build_norm_layer
from widefield.registry import MODELS

_ARCHITECTURES = ("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7")
_ENDS = (1, 2, 3, 4, 6, 8, 9)
"""Layers of torchvision's up to the end of each stage: a stage ends where the resolution changes next."""


@MODELS.register_module()
class EfficientNet(SequentialBackbone):
    """EfficientNet b0 to b7: a stem, five stages, and a last convolution.

    Tan and Le, 2019, https://arxiv.org/abs/1905.11946. The layers are torchvision's, whose checkpoints load; they pad as PyTorch
    does. `TimmBackbone` has those that pad as TensorFlow does (`tf_efficientnet_b0`), the edge networks and EfficientNetV2.

    Args:
        arch: The network.
        drop_path_rate: Probability with which an image skips a block in training; it grows linearly towards this.
        out_indices: What is returned: maps of the stem (0), of the stages (1 to 5: a half, a quarter, ... of the image's size) and
            of the last convolution (6).
        frozen_stages: How many of these seven, from the stem on, do not train.
        norm_cfg: Type and options of the norm layers; None takes those that torchvision's checkpoint was trained with.
        norm_eval: Batch norms stay in evaluation mode; their affine weights train.
        streaming: See `StreamableBackbone`.
        init_cfg: See `BaseModule`; None keeps what torchvision initialises with.
    """

    def __init__(
        self,
        arch: Literal["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7"] = "b0",
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = (6,),
        frozen_stages: int = 0,
        norm_cfg: NormConfig | None = None,
        norm_eval: bool = False,
        streaming: StreamingOptions | None = None,
        init_cfg: InitConfig = None,
    ) -> None:
        if arch not in _ARCHITECTURES:
            raise WrongArgumentError(
                f"arch={arch!r} is not one of {', '.join(_ARCHITECTURES)}; TimmBackbone has other EfficientNets, "
                "such as tf_efficientnet_b8, efficientnet_es and tf_efficientnetv2_s"
            )
        check_drop_path_rate(drop_path_rate)
        check_frozen_stages(frozen_stages, 0, len(_ENDS))
        options: dict[str, Any] = {}
        if norm_cfg is not None:
            options["norm_layer"] = lambda channels: build_norm_layer(norm_cfg, channels)[1]
        net: nn.Module = models.get_model(
            f"efficientnet_{arch}", weights=None, num_classes=1, stochastic_depth_prob=drop_path_rate, **options
        )
        features = net.get_submodule("features")
        assert isinstance(features, nn.Sequential)
        frozen_layers = [0, *_ENDS][frozen_stages]
        super().__init__(features, _ENDS, out_indices, frozen_layers, norm_eval, streaming, init_cfg)
        self.arch = arch
        self.frozen_stages = frozen_stages
