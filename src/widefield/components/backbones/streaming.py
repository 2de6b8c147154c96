"""Backbones that run tile by tile."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import Tensor, nn

from widefield.components.annotations import InitConfig
from widefield.components.backbones.base_backbone import BaseBackbone
from widefield.components.errors import WrongArgumentError
from widefield.registry import suggestion
from widefield.streaming import StreamingCNN


@dataclass(frozen=True, kw_only=True)
class StreamingOptions:
    """How a backbone streams; in a configuration a dictionary of some of these, such as `{tile_size: 2048}`.

    Each means what it means for `widefield.streaming.StreamingCNN`. Normalising the image is not the backbone's task.
    """

    tile_size: int | tuple[int, int | None] | None = None
    memory_budget: int | str | None = None
    batch_statistics: Literal["frozen", "exact"] = "frozen"
    maps: Literal["device", "host", "file"] | None = None
    scratch_dir: str | os.PathLike[str] | None = None
    saliency: bool = False
    deterministic: bool = False
    copy_to_gpu: bool = False
    unsupported: Literal["raise", "run_whole"] = "raise"
    verify: bool = True

    @classmethod
    def parse(cls, options: "StreamingOptions | Mapping[str, Any]") -> "StreamingOptions":
        """`options`, or what a dictionary of them says.

        Raises:
            WrongArgumentError: There is no option of that name.
        """
        if isinstance(options, cls):
            return options
        if not isinstance(options, Mapping):
            raise WrongArgumentError(f"streaming={options!r} must be a dictionary such as {{tile_size: 2048}}, or None")
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise WrongArgumentError(f"streaming has no option {name!r}; {suggestion(str(name), known)}")
        return cls(**options)


class StreamableBackbone(BaseBackbone):
    """A backbone of operations that are local in space: with `streaming` it computes its maps tile by tile.

    Maps and gradients are those of the plain backbone, and so are the names of the weights; the memory is that of a few tiles.
    An image is a tensor (N, C, H, W) or one that is read lazily (`LazyImage`); a list of images gives a list of tuples. A subclass
    writes `forward` for whole images and knows nothing of tiles.

    In training mode batch norms use their running statistics, unless `batch_statistics` is "exact".

    Attributes:
        streamed: What streams the backbone, for `plan(shape)`, `disable()` and `saliency_map`; None without `streaming`.

    Args:
        streaming: See `StreamingOptions`; None computes whole images.
        init_cfg: See `BaseModule`.
    """

    streamed: StreamingCNN | None = None

    def __init__(self, streaming: StreamingOptions | None = None, init_cfg: InitConfig = None) -> None:
        super().__init__(init_cfg)
        if streaming is not None:
            network = StreamingCNN(_WholeImages(self), **_arguments(StreamingOptions.parse(streaming)))
            # It takes the place of `forward`, whatever class defines that, so that hooks run once per image. Past
            # `nn.Module.__setattr__`, as it is no part of the backbone: that would contain itself.
            self.__dict__.update(streamed=network, forward=network)


class _WholeImages(nn.Module):
    """`backbone` as it is without streaming."""

    def __init__(self, backbone: BaseBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return type(self.backbone).forward(self.backbone, x)


def _arguments(options: StreamingOptions) -> dict[str, Any]:
    size = options.tile_size
    return {**asdict(options), "tile_size": tuple(size) if isinstance(size, (list, tuple)) else size}
