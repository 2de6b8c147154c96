from widefield.components.backbones.base_backbone import BaseBackbone as BaseBackbone
from widefield.components.backbones.base_backbone import StreamableBackbone as StreamableBackbone
from widefield.components.backbones.convnext import *
from widefield.components.backbones.masked_transformers import *
from widefield.components.backbones.mobile_networks import *
from widefield.components.backbones.resnet import *
from widefield.components.backbones.timm_backbone import *
from widefield.components.backbones.vision_transformer import *
from widefield.components.component import Component as Component
from widefield.components.component import build_activation_layer as build_activation_layer
from widefield.components.component import build_conv_layer as build_conv_layer
from widefield.components.component import build_norm_layer as build_norm_layer
from widefield.components.data_sample import DataSample as DataSample
from widefield.components.heads.classification_heads import *
from widefield.components.heads.dense_heads import *
from widefield.components.heads.self_supervised_heads import *
from widefield.components.key_maps import mmpretrain_names as mmpretrain_names
from widefield.components.losses.dense_losses import *
from widefield.components.losses.embedding_losses import *
from widefield.components.losses.label_losses import *
from widefield.components.losses.reconstruction_losses import *
from widefield.components.losses.reduction import weight_reduce_loss as weight_reduce_loss
from widefield.components.losses.reduction import weighted_loss as weighted_loss
from widefield.components.models.base_model import BaseModel as BaseModel
from widefield.components.models.base_model import BaseSelfSupervisor as BaseSelfSupervisor
from widefield.components.models.contrastive_models import *
from widefield.components.models.image_classifier import *
from widefield.components.models.image_to_image_retriever import *
from widefield.components.models.masked_models import *
from widefield.components.models.siamese_models import *
from widefield.components.necks.instance_attention import *
from widefield.components.necks.instance_pooling import *
from widefield.components.necks.masked_necks import *
from widefield.components.necks.projection_necks import *
from widefield.components.preprocessors.data_preprocessors import *
from widefield.components.target_generators.target_generators import *
from widefield.modules.dense_components import *
