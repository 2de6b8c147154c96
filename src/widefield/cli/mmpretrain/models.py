"""Models of MMPretrain as ours, and the networks of timm that take the place of backbones which are not here."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from widefield.cli.mmpretrain.entries import Notes, bare, listed
from widefield.registry import MODELS, arguments_of

Description = dict[str, Any]
_NAMES = {"DALL-E": "DALLEEncoder", "TIMMBackbone": "TimmBackbone", "BatchCutMix": "CutMix", "BatchMixup": "Mixup"}
_PIXELS = 255
_SIDES = ("img_size", "input_size")


def model(old: Mapping[str, Any], is_rgb: bool, notes: Notes) -> Description:
    """Return the section `model`, with its data preprocessor.

    Args:
        old: Their configuration.
        is_rgb: Whether their images are in the order of RGB before they are normalised.
        notes: Gets what is not the same here.
    """
    made: Description = _renamed(old.get("model") or {})
    preprocessor = made.pop("data_preprocessor", None) or _renamed(old.get("data_preprocessor") or {})
    if preprocessor:
        made["data_preprocessor"] = _preprocessor(preprocessor, made.get("type") == "ImageClassifier", is_rgb, notes)
    augments = (made.get("train_cfg") or {}).get("augments")
    if augments is not None:
        kept = [
            {key: value for key, value in one.items() if key not in ("num_classes", "prob")} for one in listed(augments)
        ]
        made["train_cfg"] = {**made["train_cfg"], "augments": kept}
        if isinstance(augments, dict) and augments.get("prob", 1.0) != 1.0:
            made["train_cfg"]["probs"] = [augments["prob"]]
    if old.get("load_from"):
        made["pretrained"] = old["load_from"]
    return made


def _renamed(value: Any) -> Any:
    """Return a description with the names that types have here, without scopes."""
    if isinstance(value, list):
        return [_renamed(one) for one in value]
    if not isinstance(value, dict):
        return value
    made = {key: _renamed(item) for key, item in value.items()}
    for name in ("layer_cfgs", "patch_cfg"):
        if made.get(name) == {}:
            del made[name]
    if isinstance(made.get("type"), str):
        name = bare(made["type"])
        made["type"] = _NAMES.get(name, name)
        if name == "TIMMBackbone" and "model_name" in made:
            made["name"] = made.pop("model_name")
            known = arguments_of(MODELS.get("TimmBackbone")).named
            options = {key: made.pop(key) for key in list(made) if key != "type" and key not in known}
            made |= {"options": options} if options else {}
        if name == "VQKD" and "encoder_config" in made:
            made["encoder_config"] = {"type": "BEiTViT", **made["encoder_config"]}
        if name.startswith("BEiT") and set(made.get("layer_cfgs", ())) == {"bias"}:
            bias = made.pop("layer_cfgs")["bias"]
            made["qkv_bias"] = "qv" if bias == "qv_bias" else bias
    return made


def _preprocessor(old: Description, classifies: bool, is_rgb: bool, notes: Notes) -> Description:
    made = {"type": "ClsDataPreprocessor", **old} if classifies else dict(old)
    turns = made.pop("to_rgb", False)
    if not turns and not is_rgb:
        for name in ("mean", "std"):
            if isinstance(made.get(name), list):
                made[name] = made[name][::-1]
        notes.append(
            (
                ("data_preprocessor", "to_rgb"),
                "their images are in the order of BGR and ours in that of RGB: mean and std were turned around; of weights that "
                "were trained on BGR turn the input channels of the first convolution around too",
            )
        )
    if made.get("type") != "ClsDataPreprocessor":
        made.pop("num_classes", None)
    return made


def replacement(backbone: Mapping[str, Any]) -> tuple[str, Description] | None:
    """Return the name of timm's network for a backbone of theirs, and its options; None if there is none."""
    kind = bare(backbone.get("type"))
    if kind not in _TIMM:
        return None
    try:
        name, options = _TIMM[kind](backbone)
    except (KeyError, TypeError, IndexError):
        return None
    import timm

    if not timm.is_model(name):
        return None
    if backbone.get("drop_path_rate"):
        options["drop_path_rate"] = backbone["drop_path_rate"]
    return name, options


def with_timm(made: Description, notes: Notes) -> Description:
    """Return a classifier whose backbone is one of timm, with a linear head on its pooled features.

    Raises:
        ValueError: There is no such network, or the model is no classifier of images.
    """
    found = replacement(made.get("backbone") or {})
    head = made.get("head") or {}
    if made.get("type") != "ImageClassifier" or found is None:
        raise ValueError(f"timm has nothing in the place of {describe(made)}")
    name, options = found
    backbone: Description = {"type": "TimmBackbone", "name": name, "global_pool": True}
    for given in (options, {key: item for key, item in options.items() if key != "drop_path_rate"}):
        described = {**backbone, "options": given} if given else backbone
        try:
            features = _feature_count(described)
            break
        except (ValueError, TypeError, RuntimeError) as error:
            if given == {key: item for key, item in options.items() if key != "drop_path_rate"}:
                raise
            notes.append((("model", "backbone", "drop_path_rate"), f"{name} has none: {error}"))
    if any(one.get("type") == "Pretrained" for one in listed(made["backbone"].get("init_cfg"))):
        advice = "the weights are of another network; pretrained: true in model.backbone fetches those of timm"
        notes.append((("model", "backbone", "init_cfg"), advice))
    result = {key: item for key, item in made.items() if key not in ("backbone", "neck", "head")}
    result["backbone"] = described
    classes = head.get("num_classes") or made["backbone"].get("num_classes")
    if head and classes:
        loss = head.get("loss", {"type": "CrossEntropyLoss"})
        result["head"] = {"type": "LinearClsHead", "num_classes": classes, "in_channels": features, "loss": loss}
        result["head"] |= {key: head[key] for key in ("topk", "cal_acc") if key in head}
    return result


def _feature_count(described: Description) -> int:
    with torch.device("meta"):
        backbone = MODELS.build(described).eval()
        side = described.get("options", {}).get("img_size") or backbone.model.pretrained_cfg["input_size"][-1]
        return int(backbone(torch.zeros(1, 3, side, side))[0].shape[1])


def describe(made: Mapping[str, Any]) -> str:
    """Return the names of a model and its backbone."""
    backbone = made.get("backbone") or {}
    inside = backbone.get("type") if isinstance(backbone, Mapping) else None
    return f"{made.get('type')} with {inside}" if inside else str(made.get("type"))


Rule = Callable[[Mapping[str, Any]], tuple[str, Description]]


def _plain(template: str, **options: Any) -> Rule:
    """Return the rule by which a name is filled with arguments of the backbone."""
    return lambda given: (template.format(**{"depth": "", "arch": "", **given}).lower(), dict(options))


def _swin(given: Mapping[str, Any]) -> tuple[str, Description]:
    import timm

    side = given.get("img_size", 224)
    window = ((given.get("stage_cfgs") or {}).get("block_cfgs") or {}).get("window_size", 7)
    name = f"swin_{given['arch']}_patch4_window{window}_{side}"
    return (
        (name, {})
        if timm.is_model(name)
        else (f"swin_{given['arch']}_patch4_window7_224", {"img_size": side, "window_size": window})
    )


def _swin_v2(given: Mapping[str, Any]) -> tuple[str, Description]:
    windows, before = (given.get(key) or [8] for key in ("window_size", "pretrained_window_sizes"))
    window, side = windows[0] if isinstance(windows, list) else windows, given.get("img_size", 256)
    if before[0] not in (0, 8):
        return f"swinv2_{given['arch']}_window{before[0]}to{window}_192to{side}", {}
    return f"swinv2_{given['arch']}_window{window}_{side}", {}


def _resnext(given: Mapping[str, Any]) -> tuple[str, Description]:
    depth, kind = given["depth"], f"{given.get('groups', 32)}x{given.get('width_per_group', 4)}d"
    return (f"resnext101_{kind}", {"layers": [3, 8, 36, 3]}) if depth == 152 else (f"resnext{depth}_{kind}", {})


def _sized(template: str, arch: Mapping[str, str] | None = None) -> Rule:
    """Return the rule for transformers, whose names end in the size of a patch and of an image."""

    def rule(given: Mapping[str, Any]) -> tuple[str, Description]:
        import timm

        side = given.get("img_size", 224)
        side = side[0] if isinstance(side, list) else side
        name = (arch or {}).get(given["arch"], given["arch"]).removeprefix("deit-")
        full = template.format(arch=name, patch=given.get("patch_size", 16), side=side)
        return (
            (full, {}) if timm.is_model(full) else (template.format(arch=name, patch=16, side=224), {"img_size": side})
        )

    return rule


def _regnet(given: Mapping[str, Any]) -> tuple[str, Description]:
    kind, size = given["arch"].split("_")
    megas = float(size[:-2]) * (1000 if size.endswith("gf") else 1)
    return f"{kind}_{round(megas / 100):03d}", {}


def _xcit(given: Mapping[str, Any]) -> tuple[str, Description]:
    sizes = {128: "nano", 192: "tiny", 384: "small", 512: "medium", 768: "large"}
    return f"xcit_{sizes[given['embed_dims']]}_{given['depth']}_p{given['patch_size']}_224", {}


def _of(names: Mapping[str, str]) -> Rule:
    return lambda given: (names[given["arch"]], {})


_SIZES = {"t": "tiny", "s": "small", "m": "medium", "b": "base", "l": "large", "h": "huge"}
_TIMM: dict[str, Rule] = {
    "SwinTransformer": _swin,
    "SwinTransformerV2": _swin_v2,
    "RegNet": _regnet,
    "ResNeXt": _resnext,
    "ResNetV1c": _plain("resnet{depth}c"),
    "ResNetV1d": _plain("resnet{depth}d"),
    "SEResNet": _plain("seresnet{depth}"),
    "SEResNeXt": _plain("seresnext{depth}_{groups}x{width_per_group}d"),
    "Res2Net": _plain("res2net{depth}_{base_width}w_{scales}s"),
    "ResNeSt": lambda given: (f"resnest{given['depth']}{'d' if given['depth'] == 50 else 'e'}", {}),
    "VGG": lambda given: (f"vgg{given['depth']}{'_bn' if given.get('norm_cfg') else ''}", {}),
    "DenseNet": _plain("densenet{arch}"),
    "HRNet": _plain("hrnet_{arch}"),
    "InceptionV3": _plain("inception_v3"),
    "RepVGG": _plain("repvgg_{arch}"),
    "MobileOne": _plain("mobileone_{arch}"),
    "MobileViT": _of({"small": "mobilevit_s", "x_small": "mobilevit_xs", "xx_small": "mobilevit_xxs"}),
    "EfficientNet": lambda given: (
        ("" if given["arch"] in ("es", "em", "el") else "tf_") + f"efficientnet_{given['arch']}",
        {},
    ),
    "EfficientNetV2": _plain("tf_efficientnetv2_{arch}"),
    "EdgeNeXt": _of(
        {
            "base": "edgenext_base",
            "small": "edgenext_small",
            "xsmall": "edgenext_x_small",
            "xxsmall": "edgenext_xx_small",
        }
    ),
    "EfficientFormer": _plain("efficientformer_{arch}"),
    "LeViT": _plain("levit_{arch}"),
    "PoolFormer": _plain("poolformer_{arch}"),
    "ConvMixer": _of(
        {"768/32": "convmixer_768_32", "1024/20": "convmixer_1024_20_ks9_p14", "1536/20": "convmixer_1536_20"}
    ),
    "CSPDarkNet": _plain("cspdarknet{depth}"),
    "CSPResNet": _plain("cspresnet{depth}"),
    "CSPResNeXt": _plain("cspresnext{depth}"),
    "TNT": _plain("tnt_{arch}_patch{patch_size}_{img_size}"),
    "PCPVT": _plain("twins_pcpvt_{arch}"),
    "SVT": _plain("twins_svt_{arch}"),
    "MViT": _plain("mvitv2_{arch}"),
    "DaViT": lambda given: (f"davit_{_SIZES.get(given['arch'], given['arch'])}", {}),
    "DeiT3": _sized("deit3_{arch}_patch{patch}_{side}", _SIZES),
    "DistilledVisionTransformer": _sized("deit_{arch}_distilled_patch{patch}_{side}"),
    "MlpMixer": lambda given: (f"mixer_{given['arch']}{given['patch_size']}_{given['img_size']}", {}),
    "TinyViT": _sized("tiny_vit_{arch}_{side}"),
    "ViTEVA02": _sized("eva02_{arch}_patch{patch}_{side}", _SIZES),
    "ViTSAM": _sized("samvit_{arch}_patch{patch}"),
    "XCiT": _xcit,
}
