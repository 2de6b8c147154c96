"""Backbones in stages: which maps are returned, and which layers do not train."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from widefield.components.annotations import InitConfig
from widefield.components.backbones.streaming import StreamableBackbone, StreamingOptions
from widefield.components.errors import WrongArgumentError


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
    """Refuse a number of frozen stages that there cannot be.

    Raises:
        WrongArgumentError: It is not from `lowest`, which freezes nothing, to `highest`.
    """
    if not lowest <= frozen_stages <= highest:
        raise WrongArgumentError(
            f"frozen_stages={frozen_stages} must be from {lowest} (nothing) to {highest} (all stages)"
        )


def check_drop_path_rate(drop_path_rate: float) -> None:
    """Refuse a probability of dropping residual branches that is none.

    Raises:
        WrongArgumentError: It is not in [0, 1).
    """
    if not 0 <= drop_path_rate < 1:
        raise WrongArgumentError(f"drop_path_rate={drop_path_rate} must be a probability below 1")


class SequentialBackbone(StreamableBackbone):
    """A backbone that is one sequence of layers, `features`, as the classifiers of torchvision have it.

    Args:
        features: The layers. The names of their weights are torchvision's, whose checkpoints load.
        ends: Of each stage, how many layers there are up to its end.
        out_indices: Stages whose maps are returned, from 0; negative ones count from the end.
        frozen_layers: How many of the first layers do not train.
        norm_eval: Batch norms stay in evaluation mode; their affine weights train.
        streaming: See `StreamableBackbone`.
        init_cfg: See `BaseModule`.
    """

    def __init__(
        self,
        features: nn.Sequential,
        ends: Sequence[int],
        out_indices: int | Sequence[int],
        frozen_layers: int,
        norm_eval: bool,
        streaming: StreamingOptions | None,
        init_cfg: InitConfig,
    ) -> None:
        super().__init__(streaming, init_cfg)
        self.out_indices = parse_out_indices(out_indices, len(ends))
        self.norm_eval = norm_eval
        self.features = features
        self._taps = tuple(ends[index] for index in self.out_indices)
        self._frozen_layers = frozen_layers
        self.train(self.training)  # freezes the layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outs = []
        for count, layer in enumerate(self.features[: self._taps[-1]], 1):
            x = layer(x)
            if count in self._taps:
                outs.append(x)
        return tuple(outs)

    def frozen_parts(self) -> Iterable[nn.Module]:
        return self.features[: self._frozen_layers]
