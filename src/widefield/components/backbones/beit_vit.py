"""The vision transformers of BEiT."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widefield.components.backbones.vision_transformer import OutType, VisionTransformer, new_tokens
from widefield.components.errors import WrongArgumentError
from widefield.components.layers.attention import QKVBias
from widefield.components.layers.masking import replace_masked
from widefield.components.layers.position import RelativePositionBias, Resolution
from widefield.registry import MODELS


@MODELS.register_module()
class BEiTViT(VisionTransformer):
    """Vision transformer with biases of relative positions, as BEiT has it for fine-tuning.

    Bao et al., 2021, https://arxiv.org/abs/2106.08254.

    Args:
        use_abs_pos_emb: Whether there is a position embedding too.
        use_rel_pos_bias: Each layer has biases of its own.
        use_shared_rel_pos_bias: All layers share their biases.
        qkv_bias: Biases of queries, keys and values; "qv": of queries and values alone.
        layer_scale_init_value: See `VisionTransformer`.
        out_type: See `VisionTransformer`.
        kwargs: Those of `VisionTransformer`; there is always a class token.
    """

    def __init__(
        self,
        use_abs_pos_emb: bool = False,
        use_rel_pos_bias: bool = True,
        use_shared_rel_pos_bias: bool = False,
        qkv_bias: QKVBias = "qv",
        layer_scale_init_value: float = 0.1,
        out_type: OutType = "avg_featmap",
        **kwargs: Any,
    ) -> None:
        if use_rel_pos_bias and use_shared_rel_pos_bias:
            raise WrongArgumentError(
                "use_rel_pos_bias and use_shared_rel_pos_bias exclude each other; set one to False"
            )
        super().__init__(qkv_bias=qkv_bias, layer_scale_init_value=layer_scale_init_value, out_type=out_type, **kwargs)
        if self.cls_token is None:
            raise WrongArgumentError(
                f"{type(self).__name__} needs its class token: with_cls_token=False is not to be had"
            )
        if not use_abs_pos_emb:
            self.pos_embed = None
        self.rel_pos_bias = self._new_bias() if use_shared_rel_pos_bias else None
        self.use_rel_pos_bias = use_rel_pos_bias
        if use_rel_pos_bias:
            for layer in self.layers:
                layer.add_module("rel_pos_bias", self._new_bias())
        self.train(self.training)  # freezes what is new

    def attention_biases(self, resolution: Resolution) -> Sequence[Tensor | None]:
        if self.use_rel_pos_bias:
            return [layer.get_submodule("rel_pos_bias")(resolution) for layer in self.layers]
        shared = None if self.rel_pos_bias is None else self.rel_pos_bias(resolution)
        return (shared,) * self.num_layers

    def init_weights(self) -> None:
        super().init_weights()
        if not self.is_pretrained:
            self._shrink_branches()

    def frozen_parts(self) -> Iterable[nn.Module]:
        yield from super().frozen_parts()
        shared = self._modules.get("rel_pos_bias")
        if shared is not None and self.frozen_stages == self.num_layers:
            yield shared

    def _new_bias(self) -> RelativePositionBias:
        return RelativePositionBias(self.patch_resolution, self.num_heads)

    def _shrink_branches(self) -> None:
        """Divide the last weights of both branches of layer k, from 1, by sqrt(2 k), so that their sum does not grow."""
        with torch.no_grad():
            for number, layer in enumerate(self.layers, 1):
                for name in ("attn.proj", "ffn.layers.1"):
                    layer.get_parameter(f"{name}.weight").div_((2 * number) ** 0.5)


@MODELS.register_module()
class BEiTPretrainViT(BEiTViT):
    """Vision transformer of BEiT, v1 and v2, in which a learned token replaces masked patches.

    Bao et al., 2021, https://arxiv.org/abs/2106.08254; Peng et al., 2022, https://arxiv.org/abs/2208.06366.

    Args:
        use_rel_pos_bias: See `BEiTViT`.
        use_shared_rel_pos_bias: See `BEiTViT`.
        out_type: See `VisionTransformer`.
        kwargs: Those of `BEiTViT`.
    """

    def __init__(
        self,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = True,
        out_type: OutType = "raw",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            use_rel_pos_bias=use_rel_pos_bias,
            use_shared_rel_pos_bias=use_shared_rel_pos_bias,
            out_type=out_type,
            **kwargs,
        )
        self.mask_token = nn.Parameter(new_tokens(1, self.embed_dims))

    @property
    def shared_rel_pos_bias(self) -> Tensor | None:
        """The bias (heads, 1 + L, 1 + L) that all layers share, for images of `img_size`; None where they share none."""
        return None if self.rel_pos_bias is None else self.rel_pos_bias()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """The outputs of the layers `out_indices`.

        Args:
            x: (N, channels, H, W).
            mask: (N, rows, columns) or (N, L), 1 or True where a patch is masked; None masks none.
        """
        x, resolution = self.patch_embed(x)
        if mask is not None:
            x = replace_masked(x, mask, self.mask_token)
        return self.encode(self.add_positions(self.add_cls_token(x), resolution), resolution)

    def init_tokens(self) -> None:
        super().init_tokens()
        nn.init.trunc_normal_(self.mask_token, std=0.02)
