"""What models of self-supervised learning share."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from widefield.components.annotations import BackboneConfig, HeadConfig, InitConfig, NeckConfig
from widefield.components.data_sample import DataSample
from widefield.components.errors import WrongArgumentError
from widefield.components.models.base_model import BaseModel
from widefield.components.preprocessors.base_preprocessor import PreprocessorConfig
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
        pretrained: A checkpoint; short for `init_cfg={type: Pretrained, checkpoint: ...}`.
        data_preprocessor: Normalises images; without a type a `SelfSupDataPreprocessor`.
        init_cfg: See `BaseModule`.
        lr: Learning rate of AdamW; a configuration with a section `optimizer` decides otherwise.
        weight_decay: Its weight decay.
    """

    default_preprocessor: ClassVar[str] = "SelfSupDataPreprocessor"

    def __init__(
        self,
        backbone: BackboneConfig,
        neck: NeckConfig | None = None,
        head: HeadConfig | None = None,
        target_generator: TargetGeneratorConfig | None = None,
        pretrained: str | None = None,
        data_preprocessor: PreprocessorConfig | None = None,
        init_cfg: InitConfig = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        if backbone is None:
            raise WrongArgumentError(
                f"{type(self).__name__} has no backbone; a constructor of your own hands its parts on by name: "
                "super().__init__(backbone=backbone, neck=neck, head=head, init_cfg=init_cfg)"
            )
        if pretrained is not None:
            init_cfg = {"type": "Pretrained", "checkpoint": pretrained}
        super().__init__(data_preprocessor, init_cfg, lr, weight_decay)
        self.backbone = MODELS.build(backbone)
        self.neck: Any = None if neck is None else MODELS.build(neck)
        self.head: Any = None if head is None else MODELS.build(head)
        self.target_generator: Any = None if target_generator is None else MODELS.build(target_generator)

    @property
    def with_neck(self) -> bool:
        """Whether there is a neck."""
        return self.neck is not None

    @property
    def with_head(self) -> bool:
        """Whether there is a head."""
        return self.head is not None

    @property
    def with_target_generator(self) -> bool:
        """Whether there is a target generator."""
        return self.target_generator is not None

    def forward(
        self,
        inputs: Any,
        data_samples: Sequence[DataSample] | None = None,
        mode: Literal["tensor", "loss"] = "tensor",
    ) -> Any:
        """What `mode` names: features ("tensor") or losses ("loss").

        Args:
            inputs: Images, or views of them, as the data preprocessor gives them.
            data_samples: One for each image.
            mode: One of these; there are no predictions.
        """
        if mode == "tensor":
            return self.extract_feat(inputs)
        if mode == "loss":
            return self.loss(inputs, data_samples or ())
        raise RuntimeError(f'Invalid mode "{mode}".')

    def extract_feat(self, inputs: Any) -> Any:
        """The features of images (N, C, H, W): what the backbone gives."""
        return self.backbone(inputs)

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        """How deep a parameter lies, and how many depths there are, as the backbone says, for learning rates that fall with depth.

        Raises:
            NotImplementedError: The backbone does not say.
        """
        if not hasattr(self.backbone, "get_layer_depth"):
            raise NotImplementedError(f"{type(self.backbone).__name__} does not say how deep its layers lie")
        depth: tuple[int, int] = self.backbone.get_layer_depth(param_name, "backbone.")
        return depth

    def _require(self, *parts: str) -> None:
        """Raises WrongArgumentError if one of `parts` was not given."""
        for part in parts:
            if getattr(self, part) is None:
                raise WrongArgumentError(
                    f"{type(self).__name__} needs a {part}; describe it as {part}={{type: NAME, ...}}"
                )


def two_views(inputs: Any) -> tuple[Tensor, Tensor]:
    """The views of a batch, both (N, C, H, W).

    Raises:
        WrongArgumentError: There are not two of them.
    """
    if isinstance(inputs, (list, tuple)) and len(inputs) == 2 and inputs[0].shape[:1] == inputs[1].shape[:1]:
        return inputs[0], inputs[1]
    given = f"a tensor of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else f"{len(inputs)} parts"
    raise WrongArgumentError(
        f"two views of each image are compared, and the inputs are {given}; give a list [view 1, view 2]"
    )


def batch_mask(data_samples: Sequence[DataSample], generator: Any, images: Tensor) -> Tensor:
    """The masks of the samples as a bool tensor (N, rows, columns); those of samples without are drawn.

    Args:
        data_samples: One for each image, with a `mask` or without; none at all count as without.
        generator: Called for a new mask (rows, columns); None draws none.
        images: Of the samples; the result is on their device.

    Raises:
        WrongArgumentError: There is neither a mask nor a generator.
    """
    samples = data_samples or [DataSample() for _ in images]
    if generator is None and not all("mask" in sample for sample in samples):
        raise WrongArgumentError(
            "samples have no mask; give the model a mask_generator such as {type: BEiTMaskGenerator, input_size: 14, "
            "num_masking_patches: 75}, or set the masks in the data set with DataSample.set_mask"
        )
    masks = [sample.mask if "mask" in sample else generator() for sample in samples]
    return torch.stack([mask.bool() for mask in masks]).to(images.device)
