"""The base class of components: a module whose weights are initialised by description."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from torch import nn

from widefield.components.initializers import INITIALIZERS, Pretrained
from widefield.components.layers.described import CONVS, NORMS
from widefield.registry import MODELS, ComponentOf

BackboneConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "backbone")]
NeckConfig = Annotated[nn.Module | dict[str, Any] | list[dict[str, Any]], ComponentOf(MODELS, "neck")]
HeadConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "head")]
LossConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "loss")]
InitConfig = Annotated[dict[str, Any] | list[dict[str, Any]] | None, ComponentOf(INITIALIZERS)]
ConvConfig = Annotated[
    dict[str, Any] | None,
    ComponentOf(
        CONVS,
        given=("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
    ),
]
NormConfig = Annotated[
    dict[str, Any],
    ComponentOf(NORMS, given=("num_features", "num_channels", "normalized_shape"), also={"requires_grad": bool}),
]


class Component(nn.Module):
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
        return any(isinstance(initializer, Pretrained) for initializer in self._initializers())

    def init_weights(self) -> None:
        """Initialise the weights."""
        initializers = self._initializers()
        for initializer in initializers:
            if not isinstance(initializer, Pretrained):
                initializer(self)
        _init_parts(self)
        for initializer in initializers:
            if isinstance(initializer, Pretrained):
                initializer(self)

    def _initializers(self) -> list[Any]:
        given = self.default_init_cfg if self.init_cfg is None else self.init_cfg
        return [INITIALIZERS.build(one) for one in ([given] if isinstance(given, dict) else given)]


def _init_parts(module: nn.Module) -> None:
    """Initialise the components in `module`, however deep in containers; other libraries' modules are left alone."""
    for part in module.children():
        if isinstance(part, Component):
            part.init_weights()
        else:
            _init_parts(part)


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
