"""Configurations that come with MMPretrain, as names and numbers."""

from typing import Any

Row = tuple[str, dict[str, Any], dict[str, Any] | None, dict[str, Any], str]
_GAP = {"type": "GlobalAveragePooling"}
_CE = {"type": "CrossEntropyLoss", "loss_weight": 1.0}
_SMOOTH = {"type": "LabelSmoothLoss", "label_smooth_val": 0.1, "mode": "original"}


def _linear(channels: int, classes: int = 1000, loss: dict[str, Any] = _CE) -> dict[str, Any]:
    return {"type": "LinearClsHead", "num_classes": classes, "in_channels": channels, "loss": loss}


def _token(channels: int, **others: Any) -> dict[str, Any]:
    return {"type": "VisionTransformerClsHead", "num_classes": 1000, "in_channels": channels, "loss": _CE, **others}


def _vit(arch: str, side: int, patch: int, **others: Any) -> dict[str, Any]:
    return {"type": "VisionTransformer", "arch": arch, "img_size": side, "patch_size": patch, **others}


def _convnext(arch: str, rate: float, **others: Any) -> dict[str, Any]:
    return {"type": "ConvNeXt", "arch": arch, "drop_path_rate": rate, **others}


_RESNET = {"type": "ResNet", "num_stages": 4, "out_indices": (3,), "style": "pytorch"}
_CIFAR = {"type": "ResNet_CIFAR", "num_stages": 4, "out_indices": (3,), "style": "pytorch"}
_V2 = {"layer_scale_init_value": 0.0, "use_grn": True}
_MEAN = {"out_type": "avg_featmap", "final_norm": False}
_BEIT = {"type": "BEiTViT", "arch": "base", "img_size": 224, "patch_size": 16, "out_type": "avg_featmap"}

CLASSIFIERS: list[Row] = [
    ("resnet/resnet18_8xb32_in1k", {**_RESNET, "depth": 18}, _GAP, _linear(512), "step"),
    ("resnet/resnet34_8xb32_in1k", {**_RESNET, "depth": 34}, _GAP, _linear(512), "step"),
    (
        "resnet/resnet50_32xb64-warmup-lbs_in1k",
        {**_RESNET, "depth": 50},
        _GAP,
        _linear(2048, loss=_SMOOTH),
        "iterations",
    ),
    ("resnet/resnet101_8xb32_in1k", {**_RESNET, "depth": 101}, _GAP, _linear(2048), "step"),
    ("resnet/resnet152_8xb32_in1k", {**_RESNET, "depth": 152}, _GAP, _linear(2048), "step"),
    ("resnet/resnet50_8xb256-rsb-a1", {**_RESNET, "depth": 50, "drop_path_rate": 0.05}, _GAP, _linear(2048), "lamb"),
    ("resnet/resnet18_8xb16_cifar10", {**_CIFAR, "depth": 18}, _GAP, _linear(512, 10), "step"),
    ("resnet/resnet50_8xb16_cifar100", {**_CIFAR, "depth": 50}, _GAP, _linear(2048, 100), "step"),
    (
        "wrn/wide-resnet50_8xb32_in1k",
        {**_RESNET, "depth": 50, "stem_channels": 64, "base_channels": 128, "expansion": 2},
        _GAP,
        _linear(2048),
        "step",
    ),
    (
        "mobilenet_v2/mobilenet-v2_8xb32_in1k",
        {"type": "MobileNetV2", "widen_factor": 1.0},
        _GAP,
        _linear(1280),
        "decay",
    ),
    ("efficientnet/efficientnet-b0_8xb32_in1k", {"type": "EfficientNet", "arch": "b0"}, _GAP, _linear(1280), "step"),
    ("efficientnet/efficientnet-b4_8xb32_in1k", {"type": "EfficientNet", "arch": "b4"}, _GAP, _linear(1792), "step"),
    ("efficientnet/efficientnet-b7_8xb32_in1k", {"type": "EfficientNet", "arch": "b7"}, _GAP, _linear(2560), "step"),
    ("convnext/convnext-tiny_32xb128_in1k", _convnext("tiny", 0.1), None, _linear(768, loss=_SMOOTH), "swin"),
    ("convnext/convnext-base_32xb128_in1k", _convnext("base", 0.5), None, _linear(1024, loss=_SMOOTH), "swin"),
    ("convnext/convnext-xlarge_64xb64_in1k", _convnext("xlarge", 0.5), None, _linear(2048, loss=_SMOOTH), "swin"),
    (
        "convnext_v2/convnext-v2-atto_32xb32_in1k",
        _convnext("atto", 0.1, **_V2),
        None,
        _linear(320, loss=_SMOOTH),
        "swin",
    ),
    (
        "convnext_v2/convnext-v2-huge_32xb32_in1k",
        _convnext("huge", 0.1, **_V2),
        None,
        _linear(2816, loss=_SMOOTH),
        "swin",
    ),
    ("vision_transformer/vit-base-p16_32xb128-mae_in1k", _vit("base", 224, 16), None, _token(768), "vit"),
    ("vision_transformer/vit-base-p32_64xb64_in1k-384px", _vit("b", 384, 32, drop_rate=0.1), None, _token(768), "vit"),
    ("vision_transformer/vit-large-p16", _vit("l", 224, 16, drop_rate=0.1), None, _token(1024, hidden_dim=3072), "vit"),
    ("clip/vit-base-p16_pt-64xb64_in1k", _vit("b", 224, 16, drop_rate=0.1, pre_norm=True), None, _token(768), "vit"),
    ("deit/deit-tiny_4xb256_in1k", _vit("deit-tiny", 224, 16), None, _token(192), "vit"),
    ("deit/deit-base_16xb32_in1k-384px", _vit("deit-base", 384, 16), None, _token(768), "vit"),
    ("mae/vit-base-p16_8xb128-coslr-100e_in1k", _vit("base", 224, 16, **_MEAN), None, _linear(768), "layers"),
    ("mae/vit-huge-p14_8xb128-coslr-50e_in1k", _vit("huge", 224, 14, **_MEAN), None, _linear(1280), "layers"),
    ("beit/beit-base-p16_8xb64_in1k", {**_BEIT, "use_rel_pos_bias": True}, None, _linear(768), "layers"),
    (
        "eva/eva-g-p14_16xb8_in1k-336px",
        {
            **_BEIT,
            "arch": "eva-g",
            "img_size": 336,
            "patch_size": 14,
            "use_abs_pos_emb": True,
            "use_rel_pos_bias": False,
        },
        None,
        _linear(1408),
        "vit",
    ),
    (
        "eva/eva-l-p14_8xb16_in1k-196px",
        {**_BEIT, "arch": "l", "img_size": 196, "patch_size": 14, "layer_cfgs": {"bias": True}},
        None,
        _linear(1024),
        "vit",
    ),
]
"""Name, backbone, neck, head, recipe."""

_L2 = {"type": "PixelReconstructionLoss", "criterion": "L2"}
_MLP = {"type": "NonLinearNeck", "num_layers": 2, "with_avg_pool": True}
_DECODER = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16, "in_chans": 3, "mlp_ratio": 4.0}
_PRETRAIN = {"arch": "base", "patch_size": 16, "drop_path_rate": 0.1, "out_type": "raw", "layer_scale_init_value": 0.1}
SELF_SUPERVISED: list[tuple[str, dict[str, Any]]] = [
    (
        "mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k",
        {
            "type": "MAE",
            "backbone": {"type": "MAEViT", "arch": "b", "patch_size": 16, "mask_ratio": 0.75},
            "neck": {"type": "MAEPretrainDecoder", "patch_size": 16, "embed_dim": 768, **_DECODER},
            "head": {"type": "MAEPretrainHead", "norm_pix": True, "patch_size": 16, "loss": _L2},
        },
    ),
    (
        "simclr/simclr_resnet50_8xb32-coslr-200e_in1k",
        {
            "type": "SimCLR",
            "backbone": {"type": "ResNet", "depth": 50, "norm_cfg": {"type": "SyncBN"}, "zero_init_residual": True},
            "neck": {**_MLP, "in_channels": 2048, "hid_channels": 2048, "out_channels": 128},
            "head": {"type": "ContrastiveHead", "loss": {"type": "CrossEntropyLoss"}, "temperature": 0.1},
        },
    ),
    (
        "maskfeat/maskfeat_vit-base-p16_8xb256-amp-coslr-300e_in1k",
        {
            "type": "MaskFeat",
            "backbone": {"type": "MaskFeatViT", "arch": "b", "patch_size": 16},
            "neck": {"type": "LinearNeck", "in_channels": 768, "out_channels": 108, "norm_cfg": None},
            "head": {"type": "MIMHead", "loss": _L2},
            "target_generator": {"type": "HOGGenerator", "nbins": 9, "pool": 8, "gaussian_window": 16},
        },
    ),
    (
        "beitv2/beitv2_beit-base-p16_8xb256-amp-coslr-300e_in1k",
        {
            "type": "BEiT",
            "backbone": {"type": "BEiTPretrainViT", **_PRETRAIN, "final_norm": False, "out_indices": [-4, -1]},
            "neck": {"type": "BEiTV2Neck", "num_layers": 2, "early_layers": 9, "backbone_arch": "base"},
            "head": {"type": "BEiTV2Head", "embed_dims": 768, "num_embed": 8192, "loss": {"type": "CrossEntropyLoss"}},
            "target_generator": {
                "type": "VQKD",
                "encoder_config": {"arch": "base", "out_type": "featmap", "patch_cfg": {}, "layer_cfgs": {}},
                "init_cfg": {"type": "Pretrained", "checkpoint": "vqkd_encoder.pth"},
            },
        },
    ),
]
"""Name and model."""

REPLACED: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"type": "SwinTransformer", "arch": "tiny", "img_size": 224}, "swin_tiny_patch4_window7_224", {}),
    (
        {"type": "SwinTransformer", "arch": "base", "img_size": 192, "stage_cfgs": {"block_cfgs": {"window_size": 6}}},
        "swin_base_patch4_window7_224",
        {"img_size": 192, "window_size": 6},
    ),
    (
        {
            "type": "SwinTransformer",
            "arch": "large",
            "img_size": 384,
            "stage_cfgs": {"block_cfgs": {"window_size": 12}},
        },
        "swin_large_patch4_window12_384",
        {},
    ),
    ({"type": "SwinTransformerV2", "arch": "tiny", "img_size": 256}, "swinv2_tiny_window8_256", {}),
    (
        {
            "type": "SwinTransformerV2",
            "arch": "base",
            "img_size": 384,
            "window_size": [24, 24, 24, 12],
            "pretrained_window_sizes": [12, 12, 12, 6],
        },
        "swinv2_base_window12to24_192to384",
        {},
    ),
    ({"type": "RegNet", "arch": "regnetx_400mf"}, "regnetx_004", {}),
    ({"type": "RegNet", "arch": "regnetx_1.6gf"}, "regnetx_016", {}),
    ({"type": "RegNet", "arch": "regnetx_12gf"}, "regnetx_120", {}),
    ({"type": "ResNeXt", "depth": 50, "groups": 32, "width_per_group": 4}, "resnext50_32x4d", {}),
    ({"type": "ResNeXt", "depth": 152}, "resnext101_32x4d", {"layers": [3, 8, 36, 3]}),
    ({"type": "SEResNet", "depth": 50}, "seresnet50", {}),
    ({"type": "SEResNeXt", "depth": 101, "groups": 32, "width_per_group": 4}, "seresnext101_32x4d", {}),
    ({"type": "Res2Net", "depth": 50, "scales": 8, "base_width": 14}, "res2net50_14w_8s", {}),
    ({"type": "ResNeSt", "depth": 50}, "resnest50d", {}),
    ({"type": "ResNeSt", "depth": 101}, "resnest101e", {}),
    ({"type": "VGG", "depth": 16, "num_classes": 1000}, "vgg16", {}),
    ({"type": "VGG", "depth": 19, "num_classes": 1000, "norm_cfg": {"type": "BN"}}, "vgg19_bn", {}),
    ({"type": "DenseNet", "arch": "121"}, "densenet121", {}),
    ({"type": "DeiT3", "arch": "s", "img_size": 384, "patch_size": 16}, "deit3_small_patch16_384", {}),
    ({"type": "DeiT3", "arch": "h", "img_size": 224, "patch_size": 14}, "deit3_huge_patch14_224", {}),
    (
        {"type": "DistilledVisionTransformer", "arch": "deit-tiny", "img_size": 224, "patch_size": 16},
        "deit_tiny_distilled_patch16_224",
        {},
    ),
    ({"type": "MlpMixer", "arch": "b", "img_size": 224, "patch_size": 16}, "mixer_b16_224", {}),
    ({"type": "HRNet", "arch": "w18"}, "hrnet_w18", {}),
    ({"type": "InceptionV3", "num_classes": 1000, "aux_logits": False}, "inception_v3", {}),
    ({"type": "RepVGG", "arch": "A0"}, "repvgg_a0", {}),
    ({"type": "RepVGG", "arch": "D2se"}, "repvgg_d2se", {}),
    ({"type": "MobileOne", "arch": "s1"}, "mobileone_s1", {}),
    ({"type": "MobileViT", "arch": "x_small"}, "mobilevit_xs", {}),
    ({"type": "EfficientNet", "arch": "l2"}, "tf_efficientnet_l2", {}),
    ({"type": "EfficientNet", "arch": "es"}, "efficientnet_es", {}),
    ({"type": "EfficientNetV2", "arch": "b0"}, "tf_efficientnetv2_b0", {}),
    ({"type": "EdgeNeXt", "arch": "xsmall"}, "edgenext_x_small", {}),
    ({"type": "EfficientFormer", "arch": "l1"}, "efficientformer_l1", {}),
    ({"type": "LeViT", "arch": "128s"}, "levit_128s", {}),
    ({"type": "PoolFormer", "arch": "m36"}, "poolformer_m36", {}),
    ({"type": "ConvMixer", "arch": "1024/20"}, "convmixer_1024_20_ks9_p14", {}),
    ({"type": "CSPDarkNet", "depth": 53}, "cspdarknet53", {}),
    ({"type": "TNT", "arch": "s", "img_size": 224, "patch_size": 16}, "tnt_s_patch16_224", {}),
    ({"type": "PCPVT", "arch": "small"}, "twins_pcpvt_small", {}),
    ({"type": "SVT", "arch": "base"}, "twins_svt_base", {}),
    ({"type": "MViT", "arch": "tiny"}, "mvitv2_tiny", {}),
    ({"type": "DaViT", "arch": "t"}, "davit_tiny", {}),
    ({"type": "TinyViT", "arch": "21m", "img_size": [384, 384]}, "tiny_vit_21m_384", {}),
    ({"type": "ViTEVA02", "arch": "t", "img_size": 336, "patch_size": 14}, "eva02_tiny_patch14_336", {}),
    ({"type": "XCiT", "embed_dims": 192, "depth": 12, "patch_size": 16}, "xcit_tiny_12_p16_224", {}),
]
"""Backbone, the network of timm in its place, and its options."""
