"""Plain networks by name, before they are split and streamed: torchvision's, narrow ResNets, and timm's."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias
from urllib.error import URLError

import torchvision.models
from torch import Tensor, nn
from torchvision.models import ResNet, WeightsEnum
from torchvision.models.resnet import BasicBlock

from widefield.models.weights import load_weights
from widefield.registry import suggestion

Weights: TypeAlias = str | Path | WeightsEnum | None
_ELSEWHERE = ("hf_hub:", "hf-hub:", "local-dir:")  # where else timm finds models
NARROW_RESNETS: dict[str, tuple[tuple[int, int, int, int], int]] = {
    "resnet10_w16": ((1, 1, 1, 1), 16),
    "resnet18_w8": ((2, 2, 2, 2), 8),
    "resnet18_w16": ((2, 2, 2, 2), 16),
    "resnet18_w32": ((2, 2, 2, 2), 32),
}
"""Name -> blocks per stage, channels of the first stage."""
TORCHVISION_RESNETS = tuple(
    torchvision.models.list_models(torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])
)
RESNETS = (*TORCHVISION_RESNETS, *NARROW_RESNETS)
TIMM_PREFIX = "timm/"


def make_resnet(name: str, num_classes: int, weights: Weights) -> "ResNet | NarrowResNet":
    """A torchvision ResNet with the last layer of its weights, or a narrow one with `num_classes` outputs.

    Args:
        name: One of `RESNETS`.
        num_classes: Outputs of a network without pretrained weights.
        weights: "DEFAULT", None or a file, as for `StreamingResNet`.
    """
    if name not in NARROW_RESNETS:
        return make_torchvision(name, num_classes, weights)  # type: ignore[return-value]
    if weights == "DEFAULT":
        raise ValueError(f"{name} has no pretrained weights; give weights=None for random ones, or a file")
    net = NarrowResNet(*NARROW_RESNETS[name], num_classes)
    if weights is not None:
        load_weights(net, str(weights))
    return net


def make_torchvision(name: str, num_classes: int, weights: Weights, **options: Any) -> nn.Module:
    """The torchvision model `name`: with the last layer of its published weights, else with `num_classes` outputs.

    `weights` are "DEFAULT" or another name or member of its `WeightsEnum`, a file, or None.
    """
    check_num_classes(num_classes)
    known = torchvision.models.get_model_weights(name)
    published = weights if isinstance(weights, WeightsEnum) else known.__members__.get(str(weights))
    if published is not None:
        try:
            net: nn.Module = torchvision.models.get_model(name, weights=published, **options)
        except (URLError, OSError) as error:
            raise _no_download(name, error) from error
        return net
    if weights is not None and not (isinstance(weights, (str, Path)) and Path(weights).exists()):
        raise FileNotFoundError(
            f"weights={weights!r} is neither a file nor one of the published {', '.join(known.__members__)}; "
            "leave it out (None) for random ones"
        )
    net = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    if weights is not None:
        load_weights(net, str(weights))
    return net


def check_num_classes(num_classes: int) -> None:
    """Raises ValueError if it is no positive number."""
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r} must be a positive int")


def new_linear(channels: int, num_classes: int) -> nn.Linear:
    """A last layer with Xavier-normal weights and no bias at first."""
    layer = nn.Linear(channels, num_classes)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def make_timm(name: str, num_classes: int, weights: Weights, **options: Any) -> nn.Module:
    """The timm model `name`, with or without the prefix `timm/`, with `num_classes` outputs."""
    import timm  # seconds to import, and most runs don't need it

    check_num_classes(num_classes)
    short = name.removeprefix(TIMM_PREFIX)
    if not timm.is_model(short) and not short.startswith(_ELSEWHERE):
        raise unknown_model(name, [TIMM_PREFIX + choice for choice in timm.list_models()])
    try:
        net: nn.Module = timm.create_model(short, pretrained=weights == "DEFAULT", num_classes=num_classes, **options)
    except OSError as error:
        raise _no_download(name, error) from error
    if weights is not None and weights != "DEFAULT":
        load_weights(net, str(weights))
    return net


def make_model(name: str, num_classes: int, weights: Weights, in_channels: int = 3) -> nn.Module:
    """The network of any name that `fit --model` takes: a torchvision ResNet, a narrow ResNet, or `timm/NAME`.

    For other than 3 channels, weights of the first layer are adapted as timm does: those of red, green and blue are repeated and
    scaled, or added up for one channel.

    Raises:
        ValueError: There is no such model.
    """
    if name.startswith(TIMM_PREFIX):
        return make_timm(name, num_classes, weights, in_chans=in_channels)
    if name not in RESNETS:
        import timm

        near_timm = [TIMM_PREFIX + choice for choice in timm.list_models(f"{name}*")[:20]]
        raise unknown_model(name, [*RESNETS, *near_timm])
    net = make_resnet(name, num_classes, weights)
    if in_channels != 3:
        adapt_first_layer(net, in_channels)
    return net


def adapt_first_layer(net: nn.Module, channels: int) -> None:
    """Let the first convolution take so many channels, its weights repeated over them and scaled as timm does."""
    from timm.models import adapt_input_conv

    first = next(part for part in net.modules() if isinstance(part, nn.Conv2d))
    first.weight = nn.Parameter(adapt_input_conv(channels, first.weight.detach()))
    first.in_channels = channels


def _no_download(name: str, error: Exception) -> OSError:
    return OSError(
        f"the pretrained weights of {name} could not be downloaded ({error}); "
        "fetch the file by other means and give its path as weights, or give none for random weights"
    )


def one_name(model_name: str | None, encoder: str | None, choices: Iterable[str]) -> str:
    """Return the name of a model that was given as one of two arguments.

    Raises:
        ValueError: It was given as both or none, or is not among `choices`.
    """
    if (model_name is None) == (encoder is None):
        raise ValueError(f"give model_name or encoder, one of them: got model_name={model_name!r}, encoder={encoder!r}")
    name = model_name or encoder or ""
    if name not in choices:
        raise unknown_model(name, choices)
    return name


def unknown_model(name: str, choices: Iterable[str]) -> ValueError:
    """Return the error for a model name that is not among `choices`; it names the nearest ones."""
    return ValueError(f"there is no model {name!r}; {suggestion(name, choices)}")


class NarrowResNet(nn.Module):
    """A ResNet of basic blocks, laid out and named as torchvision's `resnet18`, with `width` instead of 64 channels.

    He et al., Deep Residual Learning for Image Recognition, 2015, table 1; each stage doubles the channels.

    Args:
        blocks: Number of blocks of each of the four stages.
        width: Channels of the first stage.
        num_classes: Outputs of the last layer.
    """

    def __init__(self, blocks: tuple[int, int, int, int], width: int, num_classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _stage(width, width, blocks[0], stride=1)
        self.layer2 = _stage(width, 2 * width, blocks[1], stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks[2], stride=2)
        self.layer4 = _stage(4 * width, 8 * width, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8 * width, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, 3, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    first = BasicBlock(inputs, outputs, stride, shortcut)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))
