"""The rows of the zoo: small members of every convolutional family of timm and torchvision, and of those with windowed attention.

A row is named as for `widefield check`, or `features/NAME` (a timm pyramid), `segmentation/NAME`, `detection/NAME` (backbones with
a feature pyramid), `detection-head/NAME`. Sizes are tried in the order of `SIZES`; a row may name one that it needs.
"""

from dataclasses import dataclass, field
from typing import Any

import timm
import torchvision
from timm.models._registry import _model_to_module
from torch import nn
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

SIZES = ((97, 113), (96, 128))  # then the size that the model was made for


@dataclass(frozen=True)
class Row:
    """A model by name; `size` where the usual ones do not do, `options` for its constructor."""

    name: str
    size: tuple[int, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Sizes to try, in order; the last is the one that the model was made for."""
        if self.size:
            return (self.size,)
        kind, _, name = self.name.partition("/")
        config = timm.get_pretrained_cfg(name) if kind in ("timm", "features") else None
        default = tuple(config.input_size[1:]) if config else (224, 224)
        return tuple(dict.fromkeys((*SIZES, default)))

    def build(self) -> nn.Module:
        """The model, with random weights."""
        kind, _, name = self.name.partition("/")
        return BUILDERS[kind](name, self.options)


def _pyramid(name: str, options: dict[str, Any]) -> nn.Module:
    if name.startswith("mobilenet"):
        return mobilenet_backbone(backbone_name=name, weights=None, fpn=True, **options)
    return resnet_fpn_backbone(backbone_name=name, weights=None, **options)


class _DetectionHead(nn.Module):
    """Backbone and dense head of a one-stage detector: what comes before boxes are chosen by their scores."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None, **options)
        self.backbone, self.head = model.backbone, model.head

    def forward(self, x: Any) -> Any:
        maps = self.backbone(x)
        return self.head(list(maps.values()))


BUILDERS: dict[str, Any] = {
    "timm": lambda name, options: timm.create_model(name, pretrained=False, **options),
    "features": lambda name, options: timm.create_model(name, pretrained=False, features_only=True, **options),
    "torchvision": lambda name, options: torchvision.models.get_model(name, weights=None, **options),
    "segmentation": lambda name, options: getattr(torchvision.models.segmentation, name)(
        weights=None, weights_backbone=None, **options
    ),
    "detection": _pyramid,
    "detection-head": _DetectionHead,
}

TIMM = """
byoanet: botnet26t_256 eca_botnext26ts_256 halonet26t eca_halonext26ts sehalonet33ts lambda_resnet26t lambda_resnet26rpt_256
 lamhalobotnet50ts_256 haloregnetz_b
byobnet: test_byobnet gernet_s repvgg_a0 mobileone_s0 mobileone_s4 resnet32ts resnet51q resnext26ts seresnext26ts eca_resnext26ts
 gcresnext26ts bat_resnext26ts seresnet33ts eca_resnet33ts gcresnet33ts gcresnet50t regnetz_b16 regnetz_c16 regnetz_d8
 regnetz_b16_evos resnet50_clip resnet50_clip_gap resnet50_mlp
coat: coat_lite_tiny coat_tiny
convmixer: convmixer_768_32
convnext: convnext_atto convnext_atto_ols convnext_atto_rms convnext_zepto_rms convnext_tiny_hnf convnextv2_atto test_convnext
 test_convnext2 test_convnext3
cpubone: cpubone_nano cpubone_s0 cpubone_b0_bfrobust cpubone_b1_dwnorm
csatv2: csatv2
cspnet: cspresnet50 cspresnet50d cspresnet50w cspresnext50 cspdarknet53 darknet17 darknet21 sedarknet21 darknetaa53 cs3darknet_s
 cs3darknet_focus_s cs3sedarknet_l cs3edgenet_x cs3se_edgenet_x
cspnext: cspnext_tiny
davit: davit_tiny
densenet: densenet121 densenetblur121d
dla: dla34 dla46_c dla46x_c dla60_res2net dla60_res2next
dpn: dpn48b dpn68 dpn68b
edgenext: edgenext_xx_small edgenext_small_rw
efficientformer: efficientformer_l1
efficientformer_v2: efficientformerv2_s0
efficientnet: test_efficientnet test_efficientnet_gn test_efficientnet_ln test_efficientnet_evos efficientnet_b0
 efficientnet_b1_pruned efficientnet_b0_gn efficientnet_b0_g8_gn efficientnet_b0_g16_evos efficientnet_blur_b0
 efficientnet_cc_b0_4e efficientnet_es efficientnet_lite0 efficientnet_x_b3 efficientnetv2_rw_t gc_efficientnetv2_rw_t
 efficientnetv2_s fbnetc_100 mixnet_s mnasnet_050 mnasnet_small semnasnet_050 spnasnet_100 tinynet_e mobilenetv1_100
 mobilenetv1_100h mobilenetv2_035 mobilenetv2_110d mobilenet_edgetpu_100 mobilenet_edgetpu_v2_xs tf_efficientnet_b0
 tf_efficientnet_cc_b0_4e tf_efficientnet_es tf_efficientnet_lite0 tf_efficientnetv2_b0 tf_mixnet_s
efficientvim: efficientvim_m1
efficientvit_mit: efficientvit_b0 efficientvit_l1
efficientvit_msra: efficientvit_m0
fasternet: fasternet_t0
fastvit: fastvit_t8 fastvit_sa12 fastvit_mci0
focalnet: focalnet_tiny_srf
gcvit: gcvit_xxtiny
ghostnet: ghostnet_050 ghostnetv2_100 ghostnetv3_050
hardcorenas: hardcorenas_a
hgnet: hgnet_tiny hgnetv2_b0
hrnet: hrnet_w18_small hrnet_w18_ssld
iformer: iformer_t
inception_next: inception_next_atto
inception_resnet_v2: inception_resnet_v2
inception_v3: inception_v3
inception_v4: inception_v4
lcnetv2: lcnetv2_small
levit: levit_128s levit_conv_128s
lowformer: lowformer_b0 lowformer_e1
mambaout: test_mambaout mambaout_femto mambaout_small_rw
maxxvit: test_coatnet test_maxvit coatnet_nano_cc_224 coatnext_nano_rw_224 maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256
metaformer: poolformer_s12 poolformerv2_s12 convformer_s18 caformer_s18
mobilenetv3: mobilenetv3_small_050 mobilenetv3_large_075 mobilenetv3_rw tf_mobilenetv3_small_075 tf_mobilenetv3_small_minimal_100
 fbnetv3_b lcnet_035 mobilenetv4_conv_small_035 mobilenetv4_conv_blur_medium mobilenetv4_conv_aa_medium
 mobilenetv4_hybrid_medium_075
mobilenetv5: mobilenetv5_base
mobilevit: mobilevit_xxs mobilevitv2_050
nasnet: nasnetalarge
nest: nest_tiny
nextvit: nextvit_small
nfnet: test_nfnet nf_regnet_b0 nf_resnet26 nf_seresnet26 nf_ecaresnet26 nfnet_l0 eca_nfnet_l0 nfnet_f0 dm_nfnet_f0
pnasnet: pnasnet5large
pvt_v2: pvt_v2_b0 pvt_v2_b2_li
rdnet: rdnet_tiny
regnet: regnetx_002 regnety_002 regnetz_005 regnetv_040 regnety_040_sgn regnetz_040 regnetz_040_h
repghost: repghostnet_050
repvit: repvit_m0_9
res2net: res2net50_14w_8s res2net50d res2next50
resnest: resnest14d resnest50d_1s4x24d
resnet: resnet10t resnet18 resnet18d resnet26 resnet26t resnet50c resnet50s resnetaa34d resnetblur18 resnetrs50 resnet50_gn
 resnext50_32x4d wide_resnet50_2 seresnet18 seresnext26d_32x4d seresnetaa50d ecaresnet26t ecaresnetlight
 ecaresnext26t_32x4d test_resnet
resnetv2: resnetv2_18 resnetv2_18d resnetv2_50x1_bit resnetv2_50d_gn resnetv2_50d_evos resnetv2_50d_frn
rexnet: rexnet_100 rexnetr_100
selecsls: selecsls42
senet: legacy_seresnet18 legacy_seresnext26_32x4d
shvit: shvit_s1
sknet: skresnet18 skresnext50_32x4d
starnet: starnet_s050
swiftformer: swiftformer_xs
swin_transformer: swin_tiny_patch4_window7_224
swin_transformer_v2: swinv2_tiny_window8_256
swin_transformer_v2_cr: swinv2_cr_tiny_ns_224
tiny_vit: tiny_vit_5m_224
tresnet: tresnet_m
vgg: vgg11 vgg11_bn
visformer: visformer_tiny
vision_transformer_hybrid: vit_tiny_r_s16_p8_224
vitamin: vitamin_small_224
vovnet: vovnet39a ese_vovnet19b_slim_dw eca_vovnet39b ese_vovnet39b_evos
xception: xception legacy_xception
xception_aligned: xception41 xception41p
xcit: xcit_nano_12_p16_224
"""

FEATURES = """
resnet18 resnetv2_50x1_bit convnext_atto efficientnet_b0 mobilenetv3_small_100 hrnet_w18_small regnety_002 dla34 densenet121
cspdarknet53 ghostnet_100 vovnet39a hgnetv2_b0 repvit_m1 edgenext_xx_small
"""

TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5 mobilenet_v2
mobilenet_v3_small mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50 resnext50_32x4d wide_resnet50_2
shufflenet_v2_x0_5 squeezenet1_0 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn
"""

TORCHVISION_LEFT_OUT = {
    "vit": "transformer",
}

# Modules of timm without a row, and why. What is in neither list is named by `uncovered`.
TIMM_LEFT_OUT = {
    "beit": "transformer",
    "cait": "transformer",
    "convit": "transformer",
    "crossvit": "transformer",
    "deepseek_vit": "transformer",
    "deit": "transformer",
    "eva": "transformer",
    "gemma4_vit": "transformer",
    "hiera": "transformer",
    "hieradet_sam2": "transformer",
    "mlp_mixer": "mixes all tokens, no convolutions",
    "mvitv2": "transformer",
    "naflexvit": "transformer",
    "pit": "transformer",
    "qwen3_vit": "transformer",
    "sequencer": "recurrent over whole rows and columns",
    "tnt": "transformer",
    "twins": "transformer",
    "vision_transformer": "transformer",
    "vision_transformer_relpos": "transformer",
    "vision_transformer_sam": "transformer",
    "volo": "transformer with outlook attention",
}

# What some rows need: a size that their windows or position tables fit, or another way to build them.
SPECIAL: dict[str, dict[str, Any]] = {
    "timm/mobilenetv5_base": {"size": (96, 128)},
}


def rows() -> list[Row]:
    """All rows, timm first."""
    names = [f"timm/{name}" for line in _families().values() for name in line]
    names += [f"features/{name}" for name in FEATURES.split()]
    names += [f"torchvision/{name}" for name in TORCHVISION.split()]
    names += [f"segmentation/{name}" for name in torchvision.models.list_models(torchvision.models.segmentation)]
    names += [f"detection/{name}" for name in ("resnet18", "mobilenet_v3_large")]
    names += [f"detection-head/{name}" for name in ("retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn")]
    return [Row(name, **SPECIAL.get(name, {})) for name in names]


def _families() -> dict[str, list[str]]:
    """Names of timm models by the module that holds them, as `TIMM` has them."""
    families: dict[str, list[str]] = {}
    for line in TIMM.strip().splitlines():
        if not line.startswith(" "):
            module, _, line = line.partition(": ")
            families[module] = []
        families[module] += line.split()
    return families


def uncovered() -> list[str]:
    """Modules of the installed timm that have models, but neither a row nor a reason to be left out."""
    held = {_model_to_module[name] for names in _families().values() for name in names if name in _model_to_module}
    return sorted(set(_model_to_module.values()) - held - set(TIMM_LEFT_OUT))
