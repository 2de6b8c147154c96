"""MobileNetV2."""

from collections.abc import Sequence

from torch import nn
from torchvision import models

from widefield.components.annotations import InitConfig, NormConfig
from widefield.components.backbones.stages import SequentialBackbone, check_frozen_stages
from widefield.components.backbones.streaming import StreamingOptions
from widefield.components.errors import WrongArgumentError
from widefield.components.layers.norm import build_norm_layer
from widefield.registry import MODELS

_BLOCKS = (1, 2, 3, 4, 3, 3, 1)


@MODELS.register_module()
class MobileNetV2(SequentialBackbone):
    """MobileNetV2: seven stages of inverted residuals and a last convolution.

    Sandler et al., 2018, https://arxiv.org/abs/1801.04381. The layers are torchvision's, whose checkpoints load.

    Args:
        widen_factor: Multiplies the channels of every layer; of the last one only above 1.
        out_indices: What is returned: maps of the stages (0 to 6) and of the last convolution (7).
        frozen_stages: The stem (0) and this many stages do not train; -1 freezes nothing.
        norm_cfg: Type and options of the norm layers.
        norm_eval: Batch norms stay in evaluation mode; their affine weights train.
        streaming: See `StreamableBackbone`.
        init_cfg: See `BaseModule`; None keeps what torchvision initialises with.
    """

    def __init__(
        self,
        widen_factor: float = 1.0,
        out_indices: int | Sequence[int] = (7,),
        frozen_stages: int = -1,
        norm_cfg: NormConfig = {"type": "BN"},  # noqa: B006  # read, never written
        norm_eval: bool = False,
        streaming: StreamingOptions | None = None,
        init_cfg: InitConfig = None,
    ) -> None:
        if widen_factor <= 0:
            raise WrongArgumentError(f"widen_factor={widen_factor} must be positive")
        check_frozen_stages(frozen_stages, -1, len(_BLOCKS))

        def norm(channels: int) -> nn.Module:
            return build_norm_layer(norm_cfg, channels)[1]

        net = models.MobileNetV2(num_classes=1, width_mult=widen_factor, norm_layer=norm)
        ends = [1 + sum(_BLOCKS[: stage + 1]) for stage in range(len(_BLOCKS))]
        frozen_layers = 0 if frozen_stages < 0 else [1, *ends][frozen_stages]
        ends.append(len(net.features))
        super().__init__(net.features, ends, out_indices, frozen_layers, norm_eval, streaming, init_cfg)
        self.widen_factor = widen_factor
        self.frozen_stages = frozen_stages
