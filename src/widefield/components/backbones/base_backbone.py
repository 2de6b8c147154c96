"""Base classes of backbones: streaming, stages, and parts that do not train."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.ops import SqueezeExcitation

from widefield.components.component import Component, InitConfig, build_conv_layer
from widefield.errors import WrongArgumentError
from widefield.registry import suggestion
from widefield.streaming import StreamingCNN


class BaseBackbone(Component):
    """A feature extractor: `forward` gives a tuple of maps, one for each of `out_indices`."""

    component_kind = "backbone"
    norm_eval = False

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps of the stages that `out_indices` names."""
        raise NotImplementedError

    def frozen_parts(self) -> Iterable[nn.Module]:
        """Parts that do not train: no gradients, and evaluation mode whatever the mode of the backbone."""
        return ()

    def train(self, mode: bool = True) -> Any:
        """Set the mode; frozen parts, and with `norm_eval` batch norms, stay in evaluation mode."""
        super().train(mode)
        for part in self.frozen_parts():
            part.eval()
            part.requires_grad_(False)
        if self.norm_eval:
            for part in self.modules():
                if isinstance(part, _BatchNorm):
                    part.eval()
        return self


@dataclass(frozen=True, kw_only=True)
class StreamingOptions:
    """Options of streaming a backbone; in a configuration a dictionary of some of these, such as `{tile_size: 2048}`.

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
        init_cfg: See `Component`.
    """

    streamed: StreamingCNN | None = None

    def __init__(self, streaming: StreamingOptions | None = None, init_cfg: InitConfig = None) -> None:
        super().__init__(init_cfg)
        if streaming is not None:
            network = StreamingCNN(WholeImages(self), **_arguments(streaming))
            # It takes the place of `forward`, whatever class defines that, so that hooks run once per image. Past
            # `nn.Module.__setattr__`, as it is no part of the backbone: that would contain itself.
            self.__dict__.update(streamed=network, forward=network)


class WholeImages(nn.Module):
    """`backbone` as it is without streaming."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Any:
        return type(self.backbone).forward(self.backbone, x)


def _arguments(options: StreamingOptions | Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `StreamingCNN`.

    Raises:
        WrongArgumentError: The options are no dictionary, or there is no option of that name.
    """
    given = asdict(options) if isinstance(options, StreamingOptions) else options
    if not isinstance(given, Mapping):
        raise WrongArgumentError(f"streaming={given!r} must be a dictionary such as {{tile_size: 2048}}, or None")
    known = [field.name for field in fields(StreamingOptions)]
    for name in given:
        if name not in known:
            raise WrongArgumentError(f"streaming has no option {name!r}; {suggestion(str(name), known)}")
    size = given.get("tile_size")
    return {**given, "tile_size": tuple(size) if isinstance(size, (list, tuple)) else size}


def parse_out_indices(out_indices: int | Sequence[int], count: int) -> tuple[int, ...]:
    """`out_indices` among `count` stages in ascending order; negative ones count from the end.

    Raises:
        WrongArgumentError: There is no such stage, or none is named.
    """
    given = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    if not given or not all(-count <= index < count for index in given):
        raise WrongArgumentError(f"out_indices={out_indices} must be from 0 to {count - 1}, or from -{count} to -1")
    return tuple(sorted({index % count for index in given}))


def check_frozen_stages(frozen_stages: int, lowest: int, highest: int) -> None:
    """Raise WrongArgumentError if a number of frozen stages is not from `lowest`, which freezes nothing, to `highest`."""
    if not lowest <= frozen_stages <= highest:
        raise WrongArgumentError(
            f"frozen_stages={frozen_stages} must be from {lowest} (nothing) to {highest} (all stages)"
        )


def check_drop_path_rate(drop_path_rate: float) -> None:
    """Raise WrongArgumentError if a probability of dropping residual branches is not in [0, 1)."""
    if not 0 <= drop_path_rate < 1:
        raise WrongArgumentError(f"drop_path_rate={drop_path_rate} must be a probability below 1")


def replace_layers(module: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    """Put what `make` gives for it in the place of each layer of this kind in `module`, but for Squeeze-and-Excite convolutions."""
    for name, part in module.named_children():
        if isinstance(part, kind):
            setattr(module, name, make(part))
        elif not (isinstance(part, SqueezeExcitation) and issubclass(kind, nn.Conv2d)):
            replace_layers(part, kind, make)


def convolution_like(layer: nn.Conv2d, conv_cfg: dict[str, Any]) -> nn.Module:
    """Return the convolution that `conv_cfg` describes, see `build_conv_layer`, with the sizes and the weights of `layer`."""
    made = build_conv_layer(
        conv_cfg,
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=layer.bias is not None,
    )
    made.load_state_dict(layer.state_dict())
    return made


class SequentialBackbone(StreamableBackbone):
    """A backbone that is one sequence of layers, `features`, as the classifiers of torchvision have it.

    Args:
        features: The layers. The names of their weights are torchvision's, whose checkpoints load.
        ends: Of each stage, how many layers there are up to its end.
        out_indices: Stages whose maps are returned, from 0; negative ones count from the end.
        frozen_layers: How many of the first layers do not train.
        norm_eval: Batch norms stay in evaluation mode; their affine weights train.
        with_cp: Recompute the layers in the backward pass instead of keeping their activations.
        streaming: See `StreamableBackbone`.
        init_cfg: See `Component`; None keeps what torchvision initialises with.
    """

    def __init__(
        self,
        features: nn.Sequential,
        ends: Sequence[int],
        out_indices: int | Sequence[int],
        frozen_layers: int,
        norm_eval: bool = False,
        with_cp: bool = False,
        streaming: StreamingOptions | None = None,
        init_cfg: InitConfig = None,
    ) -> None:
        super().__init__(streaming, init_cfg)
        self.with_cp = with_cp
        self.out_indices = parse_out_indices(out_indices, len(ends))
        self.norm_eval = norm_eval
        self.features = features
        self._taps = tuple(ends[index] for index in self.out_indices)
        self._frozen_layers = frozen_layers
        self.train(self.training)  # freezes the layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outs = []
        for count, layer in enumerate(self.features[: self._taps[-1]], 1):
            x = checkpoint(layer, x, use_reentrant=False) if self.with_cp and x.requires_grad else layer(x)
            if count in self._taps:
                outs.append(x)
        return tuple(outs)

    def frozen_parts(self) -> Iterable[nn.Module]:
        return self.features[: self._frozen_layers]
