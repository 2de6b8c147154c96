"""The base class of models that learn without labels."""

from typing import Annotated, Any, ClassVar

from torch import nn

from widefield.components.component import BackboneConfig, HeadConfig, NeckConfig
from widefield.components.models.base_model import BaseModel
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, ComponentOf

TargetGeneratorConfig = Annotated[nn.Module | dict[str, Any], ComponentOf(MODELS, "target_generator")]


class BaseSelfSupervisor(BaseModel):
    """A model that learns without labels: a subclass writes `loss`, and `extract_feat` where features are not the backbone's.

    A subclass with a constructor of its own hands its parts on by name: `super().__init__(backbone=backbone, neck=neck, ...)`.

    Args:
        backbone: Gives features.
        neck: What follows it; several make a sequence.
        head: Knows the loss.
        target_generator: Makes what is to be predicted.
        kwargs: Those of `BaseModel`; a data preprocessor without a type is a `SelfSupDataPreprocessor`.
    """

    default_preprocessor: ClassVar[str] = "SelfSupDataPreprocessor"

    def __init__(
        self,
        backbone: BackboneConfig,
        neck: NeckConfig | None = None,
        head: HeadConfig | None = None,
        target_generator: TargetGeneratorConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if backbone is None:
            raise WrongArgumentError(
                f"{type(self).__name__} has no backbone; a constructor of your own hands its parts on by name: "
                "super().__init__(backbone=backbone, neck=neck, head=head, init_cfg=init_cfg)"
            )
        super().__init__(**kwargs)
        self.backbone = MODELS.build(backbone)
        self.neck: Any = None if neck is None else MODELS.build(neck)
        self.head: Any = None if head is None else MODELS.build(head)
        self.target_generator: Any = None if target_generator is None else MODELS.build(target_generator)

    @property
    def with_neck(self) -> bool:
        """True if there is a neck."""
        return self.neck is not None

    @property
    def with_head(self) -> bool:
        """True if there is a head."""
        return self.head is not None

    @property
    def with_target_generator(self) -> bool:
        """True if there is a target generator."""
        return self.target_generator is not None

    def extract_feat(self, inputs: Any) -> Any:
        """Return the features of images (N, C, H, W): what the backbone gives."""
        return self.backbone(inputs)

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """Return how deep a parameter lies, and how many depths there are, for learning rates that fall with depth.

        Raises:
            NotImplementedError: The backbone does not say.
        """
        if not hasattr(self.backbone, "get_layer_depth"):
            raise NotImplementedError(f"{type(self.backbone).__name__} does not say how deep its layers lie")
        return self.backbone.get_layer_depth(param_name, "backbone.")

    def _require(self, *parts: str) -> None:
        """Raise WrongArgumentError if one of `parts` was not given."""
        for part in parts:
            if getattr(self, part) is None:
                raise WrongArgumentError(
                    f"{type(self).__name__} needs a {part}; describe it as {part}={{type: NAME, ...}}"
                )
