"""Where a token stands: embeddings of positions, and biases of relative positions."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.errors import WrongArgumentError

Resolution = tuple[int, int]
"""Rows and columns of tokens."""


def sincos_position_embedding(
    resolution: Resolution, embed_dims: int, temperature: float = 10000.0, cls_token: bool = False
) -> Tensor:
    """Position embedding (1, L, C) of sines and cosines in two dimensions (He et al., 2021, after Vaswani et al., 2017).

    With the frequencies temperature^(-4 k / C), k from 0 to C / 4 - 1, it is the sines and the cosines of the row times each, then
    those of the column. Tokens are in row-major order.

    Args:
        resolution: Rows and columns.
        embed_dims: Channels C, a multiple of 4.
        temperature: Sets the longest wave length.
        cls_token: Begin with zeros for a class token.

    Raises:
        WrongArgumentError: C is no multiple of 4.
    """
    if embed_dims % 4:
        raise WrongArgumentError(f"embed_dims={embed_dims} must be a multiple of 4 for sines and cosines of two axes")
    quarter = embed_dims // 4
    frequencies = temperature ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in resolution), indexing="ij")
    row, column = (axis.reshape(-1, 1) * frequencies for axis in (rows, columns))
    embedding = torch.cat((row.sin(), row.cos(), column.sin(), column.cos()), dim=1)
    return functional.pad(embedding, (0, 0, int(cls_token), 0))[None]


def resize_position_embedding(
    embedding: Tensor, old: Resolution, new: Resolution, mode: str = "bicubic", extra_tokens: int = 1
) -> Tensor:
    """A position embedding (1, extra_tokens + L, C) for another number of rows and columns; extra tokens keep theirs."""
    if old == new:
        return embedding
    extra, grid = embedding[:, :extra_tokens], embedding[:, extra_tokens:]
    grid = grid.unflatten(1, old).permute(0, 3, 1, 2)
    align = None if mode in ("nearest", "area") else False
    grid = functional.interpolate(grid, new, mode=mode, align_corners=align)
    return torch.cat((extra, grid.flatten(2).transpose(1, 2)), dim=1)


class RelativePositionBias(nn.Module):
    """A learned number per head for each offset between two tokens, added to the attention.

    As in BEiT (Bao et al., 2021). Three more are for the class token: towards patches, from patches, and towards itself.

    Args:
        resolution: Rows and columns of patches.
        num_heads: Heads of the attention.
    """

    def __init__(self, resolution: Resolution, num_heads: int) -> None:
        super().__init__()
        self.resolution = resolution
        offsets = (2 * resolution[0] - 1) * (2 * resolution[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, num_heads))

    def forward(self, resolution: Resolution | None = None) -> Tensor:
        """The bias (heads, 1 + L, 1 + L); for other rows and columns than the own ones the table is resized."""
        resolution = resolution or self.resolution
        table = self.resized(self.relative_position_bias_table, self.resolution, resolution)
        index = self._index(resolution).to(table.device)
        return table[index].permute(2, 0, 1)

    @staticmethod
    def resized(table: Tensor, old: Resolution, new: Resolution) -> Tensor:
        """A table for other rows and columns: the numbers of offsets between patches are interpolated bicubically."""
        if old == new:
            return table
        sizes = [tuple(2 * n - 1 for n in resolution) for resolution in (old, new)]
        grid = table[:-3].T.unflatten(1, sizes[0])[None]
        grid = functional.interpolate(grid, sizes[1], mode="bicubic", align_corners=False)
        return torch.cat((grid[0].flatten(1).T, table[-3:]))

    @staticmethod
    def _index(resolution: Resolution) -> Tensor:
        """Row of the table for each pair of tokens (1 + L, 1 + L)."""
        rows, columns = resolution
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        row, column = row.flatten(), column.flatten()
        down = row[:, None] - row[None] + rows - 1
        right = column[:, None] - column[None] + columns - 1
        width = 2 * columns - 1
        count = (2 * rows - 1) * width
        index = functional.pad(down * width + right, (1, 0, 1, 0))
        index[0, 1:], index[1:, 0], index[0, 0] = count, count + 1, count + 2
        return index

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        """Load; a table for another square of patches is resized."""
        key = prefix + "relative_position_bias_table"
        table = state_dict.get(key)
        own = self.relative_position_bias_table
        if table is not None and table.ndim == own.ndim and len(table) != len(own) and table.shape[1] == own.shape[1]:
            side = (round((len(table) - 3) ** 0.5) + 1) // 2
            if (2 * side - 1) ** 2 == len(table) - 3:
                state_dict[key] = self.resized(table, (side, side), self.resolution)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]
