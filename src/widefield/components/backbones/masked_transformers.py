"""Vision transformers that see a part of an image: those of MAE, MaskFeat and BEiT."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widefield.components.backbones.vision_transformer import OutType, SinCosTransformer, VisionTransformer, new_tokens
from widefield.components.layers.transformer_layers import (
    QKVBias,
    RelativePositionBias,
    Resolution,
    leave_out,
    shrink_branches,
)
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS


@MODELS.register_module(replaceable=True)
class MAEViT(SinCosTransformer):
    """Vision transformer that sees a random part of the patches, the encoder of MAE.

    He et al., 2021, https://arxiv.org/abs/2111.06377. The position embedding is one of sines and cosines and does not train.

    Args:
        mask_ratio: Share of the patches that are left out, from 0 on, below 1.
        out_type: What unmasked images give.
        kwargs: Those of `VisionTransformer`; there is always a class token.
    """

    def __init__(self, mask_ratio: float = 0.75, out_type: OutType = "raw", **kwargs: Any) -> None:
        super().__init__(out_type=out_type, **kwargs)
        self.mask_ratio = mask_ratio
        self.num_patches = self.patch_resolution[0] * self.patch_resolution[1]
        _kept(self.num_patches, mask_ratio)  # refuses a wrong ratio now

    def random_masking(self, x: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        """Leave out a share `mask_ratio` of the tokens, drawn for each image.

        Args:
            x: Tokens (N, L, C).
            mask_ratio: L (1 - mask_ratio) tokens, rounded down, are kept.

        Returns:
            The kept tokens (N, kept, C) in the order they were drawn in, the mask (N, L), 1 for each token that is left out, and
            `ids_restore` (N, L), which for each place says where its token is among the kept and then the left out.

        Raises:
            WrongArgumentError: No token would be kept.
        """
        return leave_out(x, _kept(x.shape[1], mask_ratio))

    def forward(self, x: Tensor, mask: bool | None = True) -> tuple[Tensor, ...]:
        """The features of images.

        Args:
            x: (N, channels, H, W).
            mask: Leave patches out at random; with None or False no patch is, and the outputs of `out_indices` are returned.

        Returns:
            With a mask the normalised tokens (N, 1 + kept, C), the mask (N, L) and `ids_restore` (N, L), see `random_masking`.
        """
        if not mask:
            return super().forward(x)
        x, _ = self.tokens(x)
        visible, removed, ids_restore = self.random_masking(x[:, 1:], self.mask_ratio)
        *_, latent = self.layer_outputs(torch.cat((x[:, :1], visible), dim=1), None)
        return latent, removed, ids_restore


def _kept(length: int, mask_ratio: float) -> int:
    """Return how many tokens are kept: rounded down, but 10 (1 - 0.9) is 1, whatever floating-point numbers make of it."""
    kept = int(round(length * (1 - mask_ratio), 6))
    if not 1 <= kept <= length:
        raise WrongArgumentError(
            f"mask_ratio={mask_ratio} keeps {kept} of {length} patches; it must be from 0 to {1 - 1 / length:g}"
        )
    return kept


@MODELS.register_module()
class MaskFeatViT(VisionTransformer):
    """Vision transformer in which a learned token replaces masked patches, as MaskFeat has it.

    Wei et al., 2021, https://arxiv.org/abs/2112.09133.

    Args:
        out_type: What unmasked images give.
        kwargs: Those of `VisionTransformer`.
    """

    def __init__(self, out_type: OutType = "raw", **kwargs: Any) -> None:
        super().__init__(out_type=out_type, **kwargs)
        self.mask_token = nn.Parameter(new_tokens(1, self.embed_dims))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:  # type: ignore[override]
        """The features of images.

        Args:
            x: (N, channels, H, W).
            mask: (N, rows, columns) or (N, L), 1 or True where a patch is masked; None masks none, and the outputs of `out_indices`
                are returned.

        Returns:
            With a mask all tokens of the last layer, normalised (N, 1 + L, C).
        """
        if mask is None:
            return super().forward(x)
        *_, last = self.layer_outputs(*self.tokens(x, mask, self.mask_token))
        return last

    def init_tokens(self) -> None:
        super().init_tokens()
        nn.init.trunc_normal_(self.mask_token, std=0.02)


_TABLE = "rel_pos_bias.relative_position_bias_table"


@MODELS.register_module()
class BEiTViT(VisionTransformer):
    """Vision transformer with biases of relative positions, as BEiT has it for fine-tuning.

    Bao et al., 2021, https://arxiv.org/abs/2106.08254.

    Args:
        use_abs_pos_emb: Whether there is a position embedding too.
        use_rel_pos_bias: Each layer has biases of its own.
        use_shared_rel_pos_bias: All layers share their biases. Where each has its own, they load shared ones too, as BEiT is
            fine-tuned.
        qkv_bias: Biases of queries, keys and values; "qv": of queries and values alone.
        layer_scale_init_value: See `VisionTransformer`.
        final_norm: Normalise the output of the last layer; averages of "avg_featmap" have a norm of their own.
        out_type: See `VisionTransformer`.
        kwargs: Those of `VisionTransformer`; there is always a class token.
    """

    needs_cls_token = True

    def __init__(
        self,
        use_abs_pos_emb: bool = False,
        use_rel_pos_bias: bool = True,
        use_shared_rel_pos_bias: bool = False,
        qkv_bias: QKVBias = "qv",
        layer_scale_init_value: float = 0.1,
        final_norm: bool = False,
        out_type: OutType = "avg_featmap",
        **kwargs: Any,
    ) -> None:
        if use_rel_pos_bias and use_shared_rel_pos_bias:
            raise WrongArgumentError(
                "use_rel_pos_bias and use_shared_rel_pos_bias exclude each other; set one to False"
            )
        super().__init__(
            qkv_bias=qkv_bias,
            layer_scale_init_value=layer_scale_init_value,
            final_norm=final_norm,
            out_type=out_type,
            **kwargs,
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
            shrink_branches(self.layers)

    def frozen_parts(self) -> Iterable[nn.Module]:
        yield from super().frozen_parts()
        shared = self._modules.get("rel_pos_bias")
        if shared is not None and self.frozen_stages == self.num_layers:
            yield shared

    def adapt(self, weights: dict[str, Any], prefix: str) -> None:
        """See `AdaptsWeights`; biases that all layers share become those of each layer, if each has its own."""
        super().adapt(weights, prefix)
        table = weights.pop(f"{prefix}{_TABLE}", None) if self.use_rel_pos_bias else None
        if table is not None:
            for k in range(self.num_layers):
                weights.setdefault(f"{prefix}layers.{k}.{_TABLE}", table)

    def _new_bias(self) -> RelativePositionBias:
        return RelativePositionBias(self.patch_resolution, self.num_heads)


@MODELS.register_module()
class BEiTPretrainViT(BEiTViT):
    """Vision transformer of BEiT, v1 and v2, in which a learned token replaces masked patches.

    Bao et al., 2021, https://arxiv.org/abs/2106.08254; Peng et al., 2022, https://arxiv.org/abs/2208.06366.

    Args:
        use_rel_pos_bias: See `BEiTViT`.
        use_shared_rel_pos_bias: See `BEiTViT`.
        final_norm: See `BEiTViT`.
        out_type: See `VisionTransformer`.
        kwargs: Those of `BEiTViT`.
    """

    def __init__(
        self,
        use_rel_pos_bias: bool = False,
        use_shared_rel_pos_bias: bool = True,
        final_norm: bool = True,
        out_type: OutType = "raw",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            use_rel_pos_bias=use_rel_pos_bias,
            use_shared_rel_pos_bias=use_shared_rel_pos_bias,
            final_norm=final_norm,
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
        return self.encode(*self.tokens(x, mask, self.mask_token))

    def init_tokens(self) -> None:
        super().init_tokens()
        nn.init.trunc_normal_(self.mask_token, std=0.02)
