"""Image classification."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from widefield.components.backbones.base_backbone import WholeImages
from widefield.components.component import BackboneConfig, HeadConfig, NeckConfig
from widefield.components.data_sample import DataSample
from widefield.components.models.base_model import BaseModel
from widefield.components.models.features import (
    OverForeground,
    backbone_features,
    background_of,
    mask_of_map,
    neck_features,
    streams,
)
from widefield.components.necks.instance_pooling import InstancePooling
from widefield.components.preprocessors.batch_augments import BatchAugmentsConfig
from widefield.components.preprocessors.data_preprocessors import PreprocessorConfig, with_augments
from widefield.errors import WrongArgumentError
from widefield.images import Background
from widefield.registry import MODELS
from widefield.streaming import StreamingCNN

Stage = Literal["backbone", "neck", "pre_logits"]
SEVERAL_MAPS = "a mask needs a backbone that gives one map"
"""Begins the message of an error."""


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """Classification of images: a backbone, a neck, and a head that knows the loss.

    `forward` and what it calls take a tensor (N, C, H, W) of images as the data preprocessor gives them. Where the backbone streams
    they also take a list of lazily read images of any sizes; these are normalised tile by tile, and never held whole.

    Args:
        backbone: Gives a tuple of maps.
        neck: What follows it; several make a sequence.
        head: Gives scores and losses.
        train_cfg: Short for the `batch_augments` of the data preprocessor: `{augments: [{type: Mixup, alpha: 0.8}], probs: [0.5]}`.
        data_preprocessor: Normalises images; without a type a `ClsDataPreprocessor`. It learns from the head how many classes there
            are, if it needs to know.
        kwargs: Those of `BaseModel`.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        neck: NeckConfig | None = None,
        head: HeadConfig | None = None,
        *,
        train_cfg: BatchAugmentsConfig | None = None,
        data_preprocessor: PreprocessorConfig | None = None,
        **kwargs: Any,
    ) -> None:
        built_head: Any = None if head is None else MODELS.build(head)
        described = with_augments(data_preprocessor, train_cfg, getattr(built_head, "num_classes", None))
        super().__init__(data_preprocessor=described, **kwargs)
        self.backbone = MODELS.build(backbone)
        self.neck = None if neck is None else MODELS.build(neck)
        self.head = built_head
        self._neck_over: OverForeground | None = None

    def forward(self, inputs: Any, data_samples: Sequence[DataSample] | None = None, mode: str = "tensor") -> Any:
        """Return what `mode` names, see `BaseModel`; "tensor" are the head's scores, without a head the features."""
        result = super().forward(inputs, data_samples, mode)
        return self.head(result) if mode == "tensor" and self.head is not None else result

    def extract_feat(self, inputs: Any, stage: Stage = "neck") -> Any:
        """Features (a tuple) behind the backbone or the neck, or those (a tensor) that the head's last layer gets.

        Behind the backbone those of a list of images are a list of tuples.

        Raises:
            ValueError: An unknown stage, there is no head with `pre_logits`, or maps that differ in size are not pooled.
        """
        if stage not in ("backbone", "neck", "pre_logits"):
            raise WrongArgumentError(
                f'Invalid output stage "{stage}", please choose from "backbone", "neck" and "pre_logits"'
            )
        features = backbone_features(self.backbone, inputs, self.data_preprocessor)
        if stage == "backbone":
            return features
        if not (self.reads_tiles and isinstance(inputs, (list, tuple))):
            features = self.neck_features(features, background_of(inputs))
        elif any(background_of(image) is not None for image in inputs):
            each = [self.neck_features(one, background_of(image)) for one, image in zip(features, inputs, strict=True)]
            features = neck_features(None, each, of_list=True)
        else:
            features = neck_features(self.neck, features, of_list=True)
        if stage == "neck":
            return features
        if not hasattr(self.head, "pre_logits"):
            raise WrongArgumentError("No head or the head doesn't implement `pre_logits` method.")
        return self.head.pre_logits(features)

    def neck_features(self, features: Sequence[Any], background: Background | None) -> Any:
        """Return what the neck gives for the features of one image, without its background: `features` if there is no neck.

        Raises:
            ValueError: There is a background, and several maps, or an operation of the neck that needs the whole map.
        """
        if self.neck is None or background is None:
            return features if self.neck is None else self.neck(features)
        if len(features) != 1:
            raise WrongArgumentError(f"{SEVERAL_MAPS}, and this one gives {len(features)}; give one of out_indices")
        if isinstance(self.neck, InstancePooling):
            return self.neck(features, mask_of_map(background, features[0]))
        if self._neck_over is None:
            self._neck_over = OverForeground(_OfOneMap(self.neck), self.backbone.streamed)
        return self._neck_over(features[0], background)

    def extract_feats(self, inputs: Sequence[Any], stage: Stage = "neck") -> list[Any]:
        """`extract_feat` of each of several batches."""
        return [self.extract_feat(one, stage) for one in inputs]

    @cached_property
    def traced(self) -> StreamingCNN:
        """The backbone as the engine follows it: to ask for `cells` and `plan`, also where it does not stream."""
        streamed: StreamingCNN | None = getattr(self.backbone, "streamed", None)
        return streamed or StreamingCNN(WholeImages(self.backbone), unsupported="run_whole")

    @property
    def reads_tiles(self) -> bool:
        return streams(self.backbone)

    def loss(self, inputs: Any, data_samples: Sequence[DataSample]) -> dict[str, Any]:
        return self._with_head().loss(self.extract_feat(inputs), data_samples)

    def predict(self, inputs: Any, data_samples: Sequence[DataSample] | None = None) -> list[DataSample]:
        """The samples, new ones where there are none, with scores and the predicted class."""
        return self._with_head().predict(self.extract_feat(inputs), data_samples)

    def predict_step(self, batch: Any, batch_idx: int) -> list[DataSample]:
        return self.predict(*self.preprocess(batch))

    def _with_head(self) -> Any:
        if self.head is None:
            raise WrongArgumentError("this ImageClassifier has no head; give one, such as {type: LinearClsHead, ...}")
        return self.head


class _OfOneMap(nn.Module):
    """A neck, given a map alone."""

    def __init__(self, neck: nn.Module) -> None:
        super().__init__()
        self.neck = neck

    def forward(self, x: Tensor) -> Any:
        return self.neck((x,))
