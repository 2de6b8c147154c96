"""Image classification."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from widefield.components.annotations import BackboneConfig, HeadConfig, InitConfig, NeckConfig
from widefield.components.data_sample import DataSample
from widefield.components.errors import WrongArgumentError
from widefield.components.models.base_model import BaseModel
from widefield.registry import MODELS

Stage = Literal["backbone", "neck", "pre_logits"]
Mode = Literal["tensor", "loss", "predict"]


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """Classification of images: a backbone, a neck, and a head that knows the loss.

    Its description stands in the checkpoint, so `ImageClassifier.load_from_checkpoint` needs nothing else.

    Args:
        backbone: Gives a tuple of maps.
        neck: What follows it; several make a sequence.
        head: Gives scores and losses.
        pretrained: A checkpoint; short for `init_cfg={type: Pretrained, checkpoint: ...}`.
        lr: Learning rate of AdamW; a configuration with a section `optimizer` decides otherwise.
        weight_decay: Its weight decay.
        init_cfg: See `BaseModule`.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        neck: NeckConfig | None = None,
        head: HeadConfig | None = None,
        pretrained: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        init_cfg: InitConfig = None,
    ) -> None:
        if pretrained is not None:
            init_cfg = {"type": "Pretrained", "checkpoint": pretrained}
        super().__init__(lr, weight_decay, init_cfg)
        described = {"backbone": backbone, "neck": neck, "head": head}
        if not any(isinstance(part, nn.Module) for part in described.values()):
            self.save_hyperparameters({**described, "lr": lr, "weight_decay": weight_decay}, logger=False)
        self.backbone = MODELS.build(backbone)
        self.neck = None if neck is None else MODELS.build(neck)
        self.head: Any = None if head is None else MODELS.build(head)

    def forward(self, inputs: Tensor, data_samples: Sequence[DataSample] | None = None, mode: Mode = "tensor") -> Any:
        """What `mode` names: the head's scores (without a head the features), the losses, or samples with predictions.

        Args:
            inputs: Images (N, C, H, W).
            data_samples: One for each image; losses need them.
            mode: "tensor", "loss" or "predict".
        """
        if mode == "tensor":
            features = self.extract_feat(inputs)
            return features if self.head is None else self.head(features)
        if mode == "loss":
            return self.loss(inputs, data_samples or ())
        if mode == "predict":
            return self.predict(inputs, data_samples)
        raise RuntimeError(f'Invalid mode "{mode}".')

    def extract_feat(self, inputs: Tensor, stage: Stage = "neck") -> Any:
        """Features (a tuple) behind the backbone or the neck, or those (a tensor) that the head's last layer gets.

        Raises:
            ValueError: An unknown stage, or there is no head with `pre_logits`.
        """
        if stage not in ("backbone", "neck", "pre_logits"):
            raise WrongArgumentError(
                f'Invalid output stage "{stage}", please choose from "backbone", "neck" and "pre_logits"'
            )
        features = self.backbone(inputs)
        if stage != "backbone" and self.neck is not None:
            features = self.neck(features)
        if stage != "pre_logits":
            return features
        if not hasattr(self.head, "pre_logits"):
            raise WrongArgumentError("No head or the head doesn't implement `pre_logits` method.")
        return self.head.pre_logits(features)

    def loss(self, inputs: Tensor, data_samples: Sequence[DataSample]) -> dict[str, Any]:
        losses: dict[str, Any] = self._with_head().loss(self.extract_feat(inputs), data_samples)
        return losses

    def predict(self, inputs: Tensor, data_samples: Sequence[DataSample] | None = None) -> list[DataSample]:
        """The samples, new ones where there are none, with scores and the predicted class."""
        samples: list[DataSample] = self._with_head().predict(self.extract_feat(inputs), data_samples)
        return samples

    def predict_step(self, batch: Any, batch_idx: int) -> list[DataSample]:
        return self.predict(*self._unpack(batch))

    def _with_head(self) -> Any:
        if self.head is None:
            raise WrongArgumentError("this ImageClassifier has no head; give one, such as {type: LinearClsHead, ...}")
        return self.head
