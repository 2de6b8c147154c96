"""A wrapper with the embedding layer on top."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from widefield.components.models.features import OverForeground, background_of, left_out
from widefield.images import Background
from widefield.pretraining.settings import Count
from widefield.pretraining.wrapping import Wrapped
from widefield.streaming import StreamingCNN


@dataclass(frozen=True)
class StreamingArgs:
    """Options of streaming the wrapper's `forward_features`, so that views may be of any size; see `StreamingCNN`.

    Attributes:
        memory_budget: Of one pass through the wrapper; the passes of a step, for each view or size of views, are held together.
        batch_statistics: "exact" trains as the wrapper does without streaming. Batch norms then keep the maps between them, which
            `maps` puts elsewhere; "frozen" takes their running statistics and keeps none. Other norms cost nothing.
    """

    tile_size: int | tuple[int, int] | None = None
    memory_budget: int | str | None = None
    batch_statistics: Literal["exact", "frozen"] = "exact"
    maps: Literal["device", "host", "file"] | None = None
    scratch_dir: str | None = None
    unsupported: Literal["raise", "run_whole"] = "raise"
    verify: bool = True

    def stream(self, module: nn.Module) -> StreamingCNN:
        """`module`, streamed."""
        return StreamingCNN(module, **vars(self))


@dataclass(frozen=True)
class ActivationCheckpointArgs:
    """Blocks of a vision transformer that are computed again in the backward pass: one of `every_n_blocks`."""

    enabled: bool = False
    every_n_blocks: Count = 1


def checkpoint_blocks(model: nn.Module, every_n_blocks: int) -> None:
    """Make one of `every_n_blocks` blocks of a vision transformer keep its input alone for the backward pass.

    Raises:
        ValueError: The model has no `blocks`, as those of timm, nor `layers`, as those of Widefield.
    """
    blocks = next((part for name, part in model.named_children() if name in ("blocks", "layers")), None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        raise ValueError(
            f"activation_checkpoint_args are for vision transformers, and the model is a {type(model).__name__}; "
            'streaming={"memory_budget": "4GiB"} saves memory of convolutional networks'
        )
    for block in blocks[::every_n_blocks]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class FeaturesOf(nn.Module):
    """The `forward_features` of a wrapper as the forward pass of a module."""

    def __init__(self, wrapper: Wrapped) -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Return what the wrapper makes of images (B, C, H, W)."""
        return self.wrapper.forward_features(x)  # type: ignore[no-any-return]


class PoolOf(nn.Module):
    """The `forward_pool` of a wrapper as the forward pass of a module on a map alone."""

    def __init__(self, wrapper: Wrapped) -> None:
        super().__init__()
        self.wrapper = wrapper

    def forward(self, x: Tensor) -> Tensor:
        """Return pooled features (B, channels, h, w) of a map (B, channels, H, W)."""
        return self.wrapper.forward_pool({"features": x})["pooled_features"]  # type: ignore[no-any-return]


class EmbeddingModel(nn.Module):
    """A wrapper and an embedding layer: a 1x1 convolution to `embed_dim` channels, nothing if that is None.

    Args:
        wrapper: The model.
        embed_dim: Channels of the embeddings; None: those of the wrapper.
        streaming: How to stream the wrapper's `forward_features`; None runs it on whole views.
    """

    def __init__(self, wrapper: Wrapped, embed_dim: int | None = None, streaming: StreamingArgs | None = None) -> None:
        super().__init__()
        self.wrapped_model = wrapper
        channels = wrapper.feature_dim()
        self.embed_head: nn.Module = nn.Identity() if embed_dim is None else nn.Conv2d(channels, embed_dim, 1)
        self.channels: int = channels if embed_dim is None else embed_dim
        # in a tuple, so that the wrapper's weights are registered once, under the wrapper's name
        self._streamed = () if streaming is None else (streaming.stream(FeaturesOf(wrapper)),)
        self._pool_over = tuple(OverForeground(PoolOf(wrapper), network) for network in self._streamed)

    def features(self, x: Tensor) -> dict[str, Any]:
        """The wrapper's features of views (B, C, H, W), or of an image without its background."""
        if self._streamed:
            return self._streamed[0](x, **left_out(background_of(x)))  # type: ignore[no-any-return]
        return self.wrapped_model.forward_features(x)  # type: ignore[no-any-return]

    def pooled(self, features: dict[str, Any], background: Background | None = None) -> Tensor:
        """Embeddings (B, channels, h, w) of what `features` gave, pooled; of an image with a background over the rest of it.

        Raises:
            ValueError: There is a background, and features beside the map, or a pooling that needs the whole map.
        """
        if background is None:
            out: Tensor = self.embed_head(self.wrapped_model.forward_pool(features)["pooled_features"])
            return out
        if others := sorted(features.keys() - {"features"}):
            raise ValueError(f"a mask needs features that are one map, and these have {', '.join(others)} as well")
        (pool_over,) = self._pool_over
        return self.embed_head(pool_over(features["features"], background))  # type: ignore[no-any-return]

    def maps(self, features: dict[str, Any]) -> Tensor:
        """Embeddings (B, channels, H, W) of what `features` gave, not pooled."""
        out: Tensor = self.embed_head(features["features"])
        return out

    def forward(self, x: Tensor, pool: bool = True) -> Tensor:
        """Embeddings of views (B, C, H, W): (B, channels, h, w), pooled or not."""
        features = self.features(x)
        return self.pooled(features, background_of(x)) if pool else self.maps(features)

    def vectors(self, x: Tensor) -> Tensor:
        """Embeddings of views as vectors: (B, channels * h * w)."""
        return self(x).flatten(1)
