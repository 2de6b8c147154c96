"""The base class of components: a module whose layers, and the initialisation of whose weights, are described."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from torch import nn

from widefield.components.initializers import INITIALIZERS, Pretrained
from widefield.components.key_maps import AdaptsWeights
from widefield.registry import MODELS, ComponentOf, Entry, Registry

CONVS = Registry(
    "convolution",
    lambda: [
        Entry("Conv1d", "torch.nn:Conv1d"),
        Entry("Conv2d", "torch.nn:Conv2d"),
        Entry("Conv3d", "torch.nn:Conv3d"),
        Entry("Conv", "torch.nn:Conv2d"),
        Entry("Conv2dAdaptivePadding", "timm.layers:Conv2dSame"),
    ],
)
NORMS = Registry(
    "norm layer",
    lambda: [
        Entry("BN", "torch.nn:BatchNorm2d", "bn"),
        Entry("BN1d", "torch.nn:BatchNorm1d", "bn"),
        Entry("BN2d", "torch.nn:BatchNorm2d", "bn"),
        Entry("BN3d", "torch.nn:BatchNorm3d", "bn"),
        Entry("SyncBN", "torch.nn:SyncBatchNorm", "bn"),
        Entry("GN", "torch.nn:GroupNorm", "gn"),
        Entry("IN", "torch.nn:InstanceNorm2d", "in"),
        Entry("LN", "torch.nn:LayerNorm", "ln"),
        Entry("LN2d", "timm.layers:LayerNorm2d", "ln"),
    ],
)
"""The kind of a norm layer is how the attributes that hold it begin."""

_CHANNELS = {"GN": "num_channels", "LN": "normalized_shape", "LN2d": "num_channels"}

ACTIVATIONS = Registry(
    "activation",
    lambda: [
        Entry("HSigmoid", "torch.nn:Hardsigmoid"),
        Entry("HSwish", "torch.nn:Hardswish"),
        Entry("QuickGELU", "timm.layers.activations:QuickGELU"),
        Entry("Swish", "torch.nn:SiLU"),
        *(
            Entry(name, f"torch.nn:{name}")
            for name in ("ELU", "GELU", "LeakyReLU", "Mish", "PReLU", "ReLU", "ReLU6", "SiLU", "Sigmoid", "Tanh")
        ),
    ],
)

BackboneConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "backbone")]
NeckConfig = Annotated[nn.Module | dict[str, Any] | list[dict[str, Any]], ComponentOf(MODELS, "neck")]
HeadConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "head")]
LossConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "loss")]
InitConfig = Annotated[dict[str, Any] | list[dict[str, Any]] | None, ComponentOf(INITIALIZERS)]
ConvConfig = Annotated[
    dict[str, Any] | None,
    ComponentOf(
        CONVS, given=("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias")
    ),
]
NormConfig = Annotated[
    dict[str, Any],
    ComponentOf(NORMS, given=("num_features", "num_channels", "normalized_shape"), also={"requires_grad": bool}),
]
ActivationConfig = Annotated[dict[str, Any] | None, ComponentOf(ACTIVATIONS)]


class Component(AdaptsWeights):
    """A module with `init_cfg`.

    `init_weights` runs the descriptions in order, then that of every part, then the checkpoints: what is loaded stays. A module on
    which nobody calls it keeps the weights that its layers were made with.

    Attributes:
        init_cfg: What was given, None if nothing was.

    Args:
        init_cfg: One initialisation or several, such as `{type: Kaiming, layer: Conv2d}`; None takes those of the class.
    """

    default_init_cfg: ClassVar[Sequence[dict[str, Any]]] = ()
    """Descriptions that initialise the class if nothing is given."""

    def __init__(self, init_cfg: InitConfig = None) -> None:
        super().__init__()
        self.init_cfg = init_cfg

    @property
    def is_pretrained(self) -> bool:
        """True if weights come from a checkpoint, so that no other initialisation matters."""
        return bool(self.checkpoints)

    @property
    def checkpoints(self) -> list[Pretrained]:
        """The checkpoints that weights come from."""
        return [initializer for initializer in self._initializers() if isinstance(initializer, Pretrained)]

    def init_weights(self) -> None:
        """Initialise the weights."""
        for initializer in self._initializers():
            if not isinstance(initializer, Pretrained):
                initializer(self)
        init_parts(self)
        for checkpoint in self.checkpoints:
            checkpoint(self)

    def _initializers(self) -> list[Any]:
        given = self.default_init_cfg if self.init_cfg is None else self.init_cfg
        return [INITIALIZERS.build(one) for one in ([given] if isinstance(given, dict) else given)]


def init_parts(module: nn.Module) -> None:
    """Initialise the components in `module`, however deep in containers; other libraries' modules are left alone."""
    for part in module.children():
        if isinstance(part, Component):
            part.init_weights()
        else:
            init_parts(part)


class LossHead(Component):
    """A head, which knows its loss.

    Args:
        loss: The loss or its description.
        init_cfg: See `Component`.
    """

    component_kind = "head"

    def __init__(self, loss: LossConfig, init_cfg: InitConfig = None) -> None:
        super().__init__(init_cfg)
        self.loss_module = MODELS.build(loss)


def build_conv_layer(cfg: dict[str, Any] | None, *args: Any, **kwargs: Any) -> nn.Module:
    """A convolution.

    Args:
        cfg: `{type: Conv2d, ...}` with arguments that the caller leaves open, such as `padding_mode`; None is a `Conv2d`.
        args: Channels in, channels out, kernel size and so on, as the layer takes them.
        kwargs: The same by name.
    """
    arguments = dict(cfg or {"type": "Conv2d"})
    return CONVS.get(arguments.pop("type", "Conv2d"))(*args, **kwargs, **arguments)


def build_norm_layer(cfg: dict[str, Any], num_features: int, postfix: int | str = "") -> tuple[str, nn.Module]:
    """A norm layer, and the name of the attribute that holds it, such as `bn1`.

    Args:
        cfg: `{type: BN, eps: 1e-5, requires_grad: true, ...}`; `requires_grad: false` freezes weight and bias.
        num_features: Channels.
        postfix: The end of the name.
    """
    arguments = dict(cfg)
    requires_grad = arguments.pop("requires_grad", True)
    name = arguments.get("type", "")
    if name == "LN2d":
        arguments.setdefault("eps", 1e-5)  # as of every other norm; timm's would be 1e-6
    layer: nn.Module = NORMS.build(arguments, {_CHANNELS.get(name, "num_features"): num_features})
    for parameter in layer.parameters():
        parameter.requires_grad = requires_grad
    return f"{NORMS.kind(name) or 'norm'}{postfix}", layer


def build_activation_layer(cfg: dict[str, Any] | None) -> nn.Module:
    """An activation, `{type: GELU, ...}`; None is the identity."""
    return nn.Identity() if cfg is None else ACTIVATIONS.build(cfg)
