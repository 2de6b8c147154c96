from collections.abc import Callable, Iterable
from typing import Any

from widefield import components as components
from widefield import config as config
from widefield import data as data
from widefield import images as images
from widefield import inference as inference
from widefield import models as models
from widefield import modules as modules
from widefield import pretraining as pretraining
from widefield import registry as registry
from widefield import streaming as streaming
from widefield import transforms as transforms
from widefield.cli.fit import fit
from widefield.errors import WidefieldError
from widefield.images import map_target as map_target
from widefield.images import open_image
from widefield.inference import FeatureExtractor as FeatureExtractor
from widefield.inference import ImageClassificationInferencer as ImageClassificationInferencer
from widefield.inference import ImageRetrievalInferencer as ImageRetrievalInferencer
from widefield.inference import embed_patches as embed_patches
from widefield.inference import get_model, list_models
from widefield.inference import inference_model as inference_model
from widefield.inference import push_to_hub as push_to_hub
from widefield.inference import save_pretrained as save_pretrained
from widefield.inference import tile_mismatch as tile_mismatch
from widefield.models.classifier import StreamingTimm as StreamingTimm
from widefield.models.convnext import StreamingConvNeXt as StreamingConvNeXt
from widefield.models.convnext import StreamingConvNext as StreamingConvNext
from widefield.models.convnext import StreamingConvnext as StreamingConvnext
from widefield.models.patch_encoder import PatchEncoder as PatchEncoder
from widefield.models.resnet import StreamingResNet as StreamingResNet
from widefield.models.resnet import split_resnet as split_resnet
from widefield.modules import AtomicCheckpointIO as AtomicCheckpointIO
from widefield.modules import BaseModule as BaseModule
from widefield.modules import DenseModule as DenseModule
from widefield.modules import ImageNetClassifier as ImageNetClassifier
from widefield.modules import LightningStreamingModule as LightningStreamingModule
from widefield.modules import RandomState as RandomState
from widefield.modules import SplitImages as SplitImages
from widefield.modules import StreamingConstructor as StreamingConstructor
from widefield.modules import StreamingModule
from widefield.pretraining import METHODS as METHODS
from widefield.pretraining import EmbeddingFormat as EmbeddingFormat
from widefield.pretraining import ModelFormat as ModelFormat
from widefield.pretraining import ModelPart as ModelPart
from widefield.pretraining import embed, export, pretrain
from widefield.pretraining import list_methods as list_methods
from widefield.pretraining import load_model as load_model
from widefield.pretraining import load_model_from_checkpoint as load_model_from_checkpoint
from widefield.pretraining import train as train
from widefield.registry import MODELS
from widefield.streaming import Local as Local
from widefield.streaming import LocalError as LocalError
from widefield.streaming import Plan as Plan
from widefield.streaming import StreamingCNN, UnsupportedOpError, calibrate_batch_norm, split, stream

__version__: str
__all__ = [
    "MODELS",
    "StreamingCNN",
    "StreamingModule",
    "UnsupportedOpError",
    "WidefieldError",
    "__version__",
    "calibrate_batch_norm",
    "embed",
    "export",
    "fit",
    "get_model",
    "list_models",
    "open_image",
    "pretrain",
    "split",
    "stream",
]

def lazy_names(
    package: str, file: str, more: Callable[[], Iterable[str]] = ...
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]: ...
