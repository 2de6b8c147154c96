"""Masked tokens."""

from torch import Tensor


def replace_masked(tokens: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """`tokens` (N, L, C) with `mask_token` in the place of the masked ones.

    Args:
        tokens: Of patches, without a class token.
        mask: (N, L), or (N, rows, columns): 1 or True where a patch is masked.
        mask_token: (1, 1, C).

    Raises:
        ValueError: The mask is for another number of images or patches.
    """
    if mask.ndim < 2 or mask.flatten(1).shape != tokens.shape[:2]:
        raise ValueError(
            f"the mask has the shape {tuple(mask.shape)}; {tokens.shape[0]} images of {tokens.shape[1]} patches need "
            f"({tokens.shape[0]}, rows, columns) or {tuple(tokens.shape[:2])}"
        )
    weight = mask.flatten(1).unsqueeze(2).to(tokens.dtype)
    return tokens * (1 - weight) + mask_token * weight
