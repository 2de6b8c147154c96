"""Vision transformers, opened: methods of masked patches replace tokens, or leave them out, before the first layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widefield.components.backbones.masked_transformers import BEiTViT
from widefield.components.backbones.vision_transformer import VisionTransformer
from widefield.components.layers.transformer_layers import Resolution, replace_masked
from widefield.components.transforms.masks import BEiTMaskGenerator
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods.base import Method, Run
from widefield.pretraining.transform_args import TransformArgs

LEAST_BLOCK = 16
"""Patches of the smallest block that is masked, on grids that are large enough (Bao et al., 2021)."""


class Transformer:
    """The parts of a vision transformer of timm.

    Attributes:
        patch_size: Side of a patch, in pixels.
        channels: Of the images.
        width: Channels of a token.
        heads: Of the attention.
        depth: Layers.
        prefix: Tokens in front of those of patches; the first is the class token, if there is one.
        has_class_token: Whether there is one.
        norm: Normalises the output of the last layer.
        needs_all_patches: No patch can be left out, because attention knows the place of a token from its number.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.patch_size, self.channels = model.patch_embed.patch_size[0], model.patch_embed.proj.in_channels
        self.width, self.depth = model.embed_dim, len(model.blocks)
        self.heads, self.norm = model.blocks[0].attn.num_heads, model.norm
        self.prefix, self.has_class_token = model.num_prefix_tokens, model.cls_token is not None
        self.needs_all_patches = False

    def grid(self, images: Tensor) -> Resolution:
        """Return rows and columns of patches of images (B, C, H, W).

        Raises:
            ValueError: Patches do not fill the images.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"views have {height} x {width} pixels, which patches of {self.patch_size} do not fill; give multiples of "
                f"{self.patch_size} as transform_args={{'image_size': ...}}, and as view_size of local_view if there is one"
            )
        return height // self.patch_size, width // self.patch_size

    def tokens(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Return tokens (B, prefix + L, width) with their positions; `mask_token` (1, 1, width) stands for patches of `mask`.

        Args:
            images: (B, C, H, W).
            mask: (B, rows, columns), 1 or True where a patch is masked; None masks none.
            mask_token: Needed with a mask.
        """
        patches: Tensor = self.model.patch_embed(images)
        if mask is not None:
            assert mask_token is not None
            flat = patches.flatten(1, -2)  # (B, rows, columns, C) where the model takes any size
            patches = replace_masked(flat, mask, mask_token).view_as(patches)
        result: Tensor = self.model.norm_pre(self._with_positions(patches))
        return result

    def layers(self, tokens: Tensor, grid: Resolution | None, norm: nn.Module | None = None) -> list[Tensor]:
        """Return what every layer makes of `tokens` (B, N, width), the last one normalised.

        Args:
            tokens: Of `tokens`, some left out or not.
            grid: Of the patches; None if some were left out.
            norm: Normalises the last one; None: the model's own `norm`.
        """
        outs = []
        for block, options in zip(self.model.blocks, self._block_options(grid), strict=True):
            tokens = block(tokens, **options)
            outs.append(tokens)
        return [*outs[:-1], (norm or self.norm)(tokens)]

    def _with_positions(self, patches: Tensor) -> Tensor:
        return self.model._pos_embed(patches)  # type: ignore[no-any-return]

    def _block_options(self, grid: Resolution | None) -> Sequence[dict[str, Any]]:
        """Return what each block is given beside the tokens."""
        return [{}] * self.depth

    def depth_of(self, name: str) -> int:
        """Return how deep a parameter lies: 0 is the embedding, k + 1 is layer k, and `depth` + 1 what follows."""
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        is_embedding = name.startswith(
            ("cls_token", "reg_token", "mask_token", "pos_embed", "patch_embed", "norm_pre", "rope")
        )
        return 0 if is_embedding else self.depth + 1

    def shared_bias(self, grid: Resolution) -> Tensor | None:
        """Return what all layers add to their attention, (heads, 1 + L, 1 + L); None where they share nothing."""
        return None


class EvaTransformer(Transformer):
    """The parts of timm's `Eva`, the class of its transformers with rotary positions, DINOv3's among them.

    Raises:
        ValueError: The model drops patches itself.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.needs_all_patches = model.rope is not None
        if model.patch_drop is not None:
            raise ValueError(
                "the model drops patches itself, and the method must know where each one is; leave patch_drop_rate out"
            )

    def _with_positions(self, patches: Tensor) -> Tensor:
        return self.model._pos_embed(patches)[0]  # type: ignore[no-any-return]

    def _block_options(self, grid: Resolution | None) -> Sequence[dict[str, Any]]:
        if self.model.rope is None:
            return super()._block_options(grid)
        rope = self.model.rope.get_embed(shape=grid)  # drawn once for all layers where it is changed at random
        return [{"rope": one} for one in (rope if self.model.rope_mixed else [rope] * self.depth)]


class OwnTransformer(Transformer):
    """The parts of Widefield's `VisionTransformer`, and of what is derived from it."""

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model
        self.width, self.heads, self.depth = model.embed_dims, model.num_heads, model.num_layers
        self.norm = model.norm1
        projection: Any = model.patch_embed.projection
        self.patch_size, self.channels = projection.kernel_size[0], projection.in_channels
        self.prefix, self.has_class_token = model.num_extra_tokens, model.cls_token is not None
        self.needs_all_patches = isinstance(model, BEiTViT)

    def tokens(self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        tokens: Tensor = self.model.tokens(images, mask, mask_token)[0]
        return tokens

    def layers(self, tokens: Tensor, grid: Resolution | None, norm: nn.Module | None = None) -> list[Tensor]:
        return list(self.model.layer_outputs(tokens, grid, norm))

    def depth_of(self, name: str) -> int:
        depth: int = self.model.get_layer_depth(name)[0]
        return depth

    def shared_bias(self, grid: Resolution) -> Tensor | None:
        bias = getattr(self.model, "rel_pos_bias", None)
        return None if bias is None else bias(grid)  # type: ignore[no-any-return]


def opened(embedding: EmbeddingModel, method: str, class_token: bool = False) -> Transformer:
    """The transformer in a wrapper.

    Args:
        embedding: The wrapper, without an embedding layer.
        method: Its name, for messages.
        class_token: Whether the method needs one.

    Raises:
        ValueError: It is no vision transformer that is known, has no class token, or there is an embedding layer.
    """
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer as TimmViT

    wrapper: Any = embedding.wrapped_model
    model = wrapper.get_model()
    kinds = ((TimmViT, Transformer), (Eva, EvaTransformer), (VisionTransformer, OwnTransformer))
    kind = next((parts for kind, parts in kinds if isinstance(model, kind)), None)
    if kind is None:
        raise ValueError(
            f"method={method!r} hides patches from the model, which only a vision transformer can do without; a "
            f"{type(model).__name__} cannot: its layers mix neighbouring pixels before a patch could be hidden. Give "
            f"model='timm/vit_small_patch16_224', or a wrapper whose get_model() is a VisionTransformer of timm (or Eva) "
            f"or of widefield.components; or choose a method for all models, such as 'dino' or 'simclr'"
        )
    if not isinstance(embedding.embed_head, nn.Identity):
        raise ValueError(f"embed_dim: {method} trains the tokens of the transformer; leave embed_dim out")
    transformer = kind(model)
    if class_token and not transformer.has_class_token:
        raise ValueError(f"method={method!r} needs a class token, and this {type(model).__name__} has none")
    return transformer


def mask_token(transformer: Transformer) -> nn.Parameter:
    """The model's own mask token (1, 1, width) if it has one, else a new one."""
    own = getattr(transformer.model, "mask_token", None)
    if isinstance(own, nn.Parameter):
        return own
    weight = next(transformer.model.parameters())
    return nn.Parameter(nn.init.trunc_normal_(weight.new_empty(1, 1, transformer.width), std=0.02))


def block_masks(grid: Resolution, shares: Sequence[float]) -> list[Tensor]:
    """For every share a mask (rows, columns), True in blocks that hold this share of the patches, but at least one patch."""
    masks = []
    for share in shares:
        count = max(1, round(share * grid[0] * grid[1]))
        least = min(LEAST_BLOCK, max(1, count // 4))
        masks.append(BEiTMaskGenerator(grid, count, least)().bool())
    return masks


class MaskedMethod(Method):
    """A method that hides patches of views from a vision transformer; a subclass writes `of_view`.

    Args:
        embedding, run: See `Method`.
        name: Its name, for messages.
        mask_ratio: Share of the patches that are hidden.

    Raises:
        ValueError: The model is something else, or the share is not above 0 and below 1.
    """

    needs_transformer = True
    transforms = TransformArgs(color_jitter=None, random_gray_scale=None, gaussian_blur=None, num_views=1)

    def __init__(self, embedding: EmbeddingModel, run: Run, name: str, mask_ratio: float) -> None:
        super().__init__(embedding, run)
        self.transformer = opened(embedding, name)
        if not 0 < mask_ratio < 1:
            raise ValueError(f"method_args.mask_ratio={mask_ratio} must be above 0 and below 1")
        self.mask_ratio = mask_ratio

    def masks(self, images: Tensor, grid: Resolution) -> Tensor:
        """Return masks (B, rows, columns) in blocks, True for hidden patches."""
        return torch.stack(block_masks(grid, [self.mask_ratio] * len(images))).to(images.device)

    def of_view(self, images: Tensor) -> Tensor:
        """Return the loss of one view (B, C, H, W) of each image."""
        raise NotImplementedError

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        return {"loss": torch.stack([self.of_view(view) for view in views]).mean()}
