"""The blocks of ResNet."""

from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

from widefield.components.layers.conv import build_conv_layer
from widefield.components.layers.norm import build_norm_layer

Style = Literal["pytorch", "caffe"]


class ResidualBlock(nn.Module):
    """A residual branch beside a shortcut, and a ReLU over their sum.

    Args:
        in_channels: Of the block's input.
        out_channels: Of its output.
        expansion: Channels of the output per channel inside.
        stride: Of the block.
        dilation: Of its 3 x 3 convolutions.
        downsample: The shortcut; None passes the input on.
        style: Which convolution of a bottleneck has the stride: the 3 x 3 ("pytorch") or the first ("caffe").
        with_cp: Recompute the branch in the backward pass instead of keeping its activations.
        conv_cfg: See `build_conv_layer`.
        norm_cfg: See `build_norm_layer`.
        drop_path_rate: Probability with which the branch of an image is left out in training.
    """

    default_expansion: int
    conv1: nn.Module
    conv2: nn.Module
    conv3: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expansion: int,
        stride: int = 1,
        dilation: int = 1,
        downsample: nn.Module | None = None,
        style: Style = "pytorch",
        with_cp: bool = False,
        conv_cfg: dict[str, Any] | None = None,
        norm_cfg: dict[str, Any] = {"type": "BN"},  # noqa: B006  # read, never written
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv_cfg = conv_cfg
        self.norm_cfg = norm_cfg
        self.with_cp = with_cp
        self._make_branch(in_channels, out_channels // expansion, out_channels, stride, dilation, style)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path = StochasticDepth(drop_path_rate, "row") if drop_path_rate else nn.Identity()

    def _make_branch(self, before: int, inside: int, after: int, stride: int, dilation: int, style: Style) -> None:
        raise NotImplementedError

    def _branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _add(self, number: int, before: int, after: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        """Add the convolution `number` and its norm layer."""
        padding = dilation * (kernel // 2)
        conv = build_conv_layer(
            self.conv_cfg, before, after, kernel, stride=stride, padding=padding, dilation=dilation, bias=False
        )
        self.add_module(f"conv{number}", conv)
        name, norm = build_norm_layer(self.norm_cfg, after, postfix=number)
        self.add_module(name, norm)
        setattr(self, f"norm{number}_name", name)

    def norm(self, number: int) -> nn.Module:
        """The norm layer behind the convolution `number`."""
        return cast(nn.Module, getattr(self, getattr(self, f"norm{number}_name")))

    @property
    def last_norm(self) -> nn.Module:
        """The norm layer at the end of the branch."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The output of the block."""
        branch = (
            checkpoint(self._branch, x, use_reentrant=False) if self.with_cp and x.requires_grad else self._branch(x)
        )
        shortcut = x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(self.drop_path(branch) + shortcut)
        return result


class BasicBlock(ResidualBlock):
    """Two 3 x 3 convolutions."""

    default_expansion = 1

    def _make_branch(self, before: int, inside: int, after: int, stride: int, dilation: int, style: Style) -> None:
        self._add(1, before, inside, 3, stride, dilation)
        self._add(2, inside, after, 3)

    def _branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(1)(self.conv1(x)))
        result: Tensor = self.norm(2)(self.conv2(x))
        return result

    @property
    def last_norm(self) -> nn.Module:
        return self.norm(2)


class Bottleneck(ResidualBlock):
    """A 3 x 3 convolution of few channels between two of 1 x 1."""

    default_expansion = 4

    def _make_branch(self, before: int, inside: int, after: int, stride: int, dilation: int, style: Style) -> None:
        first, second = (1, stride) if style == "pytorch" else (stride, 1)
        self._add(1, before, inside, 1, first)
        self._add(2, inside, inside, 3, second, dilation)
        self._add(3, inside, after, 1)

    def _branch(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(1)(self.conv1(x)))
        x = self.relu(self.norm(2)(self.conv2(x)))
        result: Tensor = self.norm(3)(self.conv3(x))
        return result

    @property
    def last_norm(self) -> nn.Module:
        return self.norm(3)
