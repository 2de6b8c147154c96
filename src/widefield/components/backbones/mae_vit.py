"""The encoder of masked autoencoders."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from widefield.components.backbones.vision_transformer import OutType, VisionTransformer
from widefield.components.errors import WrongArgumentError
from widefield.components.layers.position import sincos_position_embedding
from widefield.registry import MODELS


@MODELS.register_module(replaceable=True)
class MAEViT(VisionTransformer):
    """Vision transformer that sees a random part of the patches, the encoder of MAE.

    He et al., 2021, https://arxiv.org/abs/2111.06377. The position embedding is one of sines and cosines and does not train.

    Args:
        mask_ratio: Share of the patches that are left out, from 0 on, below 1.
        out_type: What unmasked images give.
        kwargs: Those of `VisionTransformer`; there is always a class token.
    """

    default_init_cfg = (
        {"type": "Xavier", "distribution": "uniform", "layer": "Linear"},
        {"type": "Constant", "val": 1, "layer": "LayerNorm"},
    )

    def __init__(self, mask_ratio: float = 0.75, out_type: OutType = "raw", **kwargs: Any) -> None:
        super().__init__(out_type=out_type, **kwargs)
        if self.cls_token is None:
            raise WrongArgumentError("MAEViT needs its class token: with_cls_token=False is not to be had")
        self.mask_ratio = mask_ratio
        self.num_patches = self.patch_resolution[0] * self.patch_resolution[1]
        _kept(self.num_patches, mask_ratio)  # refuses a wrong ratio now
        self.pos_embed = nn.Parameter(self._sincos(), requires_grad=False)

    def frozen_parts(self) -> Iterable[nn.Module]:
        assert self.pos_embed is not None
        yield from super().frozen_parts()
        yield nn.ParameterList([self.pos_embed])

    def init_tokens(self) -> None:
        with torch.no_grad():
            assert self.pos_embed is not None
            self.pos_embed.copy_(self._sincos())
        projection = self.patch_embed.projection.weight
        nn.init.xavier_uniform_(projection.view(len(projection), -1))  # as the linear layer that it is
        assert self.cls_token is not None
        nn.init.normal_(self.cls_token, std=0.02)

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
        count, length, channels = x.shape
        kept = _kept(length, mask_ratio)
        ids_shuffle = torch.rand(count, length, device=x.device).argsort(dim=1)
        ids_restore = ids_shuffle.argsort(dim=1)
        visible = x.gather(1, ids_shuffle[:, :kept, None].expand(-1, -1, channels))
        mask = (ids_restore >= kept).to(x.dtype)
        return visible, mask, ids_restore

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
        x, resolution = self.patch_embed(x)
        positions = self.position_embedding(resolution)
        assert positions is not None
        assert self.cls_token is not None
        visible, removed, ids_restore = self.random_masking(x + positions[:, 1:], self.mask_ratio)
        cls_token = (self.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        x = self.pre_norm(self.drop_after_pos(torch.cat((cls_token, visible), dim=1)))
        for layer in self.layers:
            x = layer(x)
        return self.norm1(x), removed, ids_restore

    def _sincos(self) -> Tensor:
        return sincos_position_embedding(self.patch_resolution, self.embed_dims, cls_token=True)


def _kept(length: int, mask_ratio: float) -> int:
    """How many of `length` tokens are kept: rounded down, but 10 (1 - 0.9) is 1, whatever floating-point numbers make of it."""
    kept = int(round(length * (1 - mask_ratio), 6))
    if not 1 <= kept <= length:
        raise WrongArgumentError(
            f"mask_ratio={mask_ratio} keeps {kept} of {length} patches; it must be from 0 to {1 - 1 / length:g}"
        )
    return kept
