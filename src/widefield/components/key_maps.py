"""Names of weights in checkpoints of MMPretrain, timm and torchvision, and their names here.

A row is (name there, name here). It is for the module or the parameter of that name and for all that is inside; `{k}`, or another
letter in braces, stands for a number. The first row that fits holds. Rows of a class are for its subclasses too.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn

Row = tuple[str, str | None]
"""A name there and the name here, None for what is not needed here."""

_MOBILENET_BLOCKS = (1, 2, 3, 4, 3, 3, 1)
_EFFICIENTNET_STAGES = ((1,), (2,), (3,), (4, 5), (6, 7))
"""Stages of torchvision's EfficientNet in each of those there, which end where the resolution changes."""
_NECK_LAYERS = 16


def _beit_layers(layers: str) -> list[Row]:
    return [(f"{layers}.{{k}}.gamma_{k}", f"{layers}.{{k}}.gamma{k}") for k in (1, 2)]


def _mobilenet_v2() -> Iterator[Row]:
    yield from _conv_bn("conv1", "features.0")
    index = 1
    for stage, count in enumerate(_MOBILENET_BLOCKS, 1):
        for block in range(count):
            theirs, ours = f"layer{stage}.{block}.conv", f"features.{index}.conv"
            last = 1 if stage == 1 else 2
            for k in range(last):
                yield from _conv_bn(f"{theirs}.{k}", f"{ours}.{k}")
            yield from [(f"{theirs}.{last}.conv", f"{ours}.{last}"), (f"{theirs}.{last}.bn", f"{ours}.{last + 1}")]
            index += 1
    yield from _conv_bn("conv2", f"features.{index}")


def _mobilenet_v3(features: Any) -> Iterator[Row]:
    last = len(features) - 1
    yield from _conv_bn("layer0", "features.0")
    for k in range(1, last):
        yield from _inverted_residual(f"layer{k}", f"features.{k}.block", features[k].block)
    yield from _conv_bn(f"layer{last}", f"features.{last}")


def _efficientnet(features: Any) -> Iterator[Row]:
    yield from _conv_bn("layers.0", "features.0")
    for stage, parts in enumerate(_EFFICIENTNET_STAGES, 1):
        blocks = [(f"features.{part}.{k}.block", one.block) for part in parts for k, one in enumerate(features[part])]
        for index, (ours, block) in enumerate(blocks):
            yield from _inverted_residual(f"layers.{stage}.{index}", ours, block)
    yield from _conv_bn("layers.6", "features.8")


def _inverted_residual(theirs: str, ours: str, block: Any) -> Iterator[Row]:
    """Yield rows of a block of torchvision: it need not have an expansion, nor squeeze-and-excitation (`fc1`, `fc2`)."""
    squeezes = any(hasattr(part, "fc1") for part in block)
    parts = [
        *(["expand_conv"] if len(block) - squeezes > 2 else []),  # depthwise and linear convolution
        "depthwise_conv",
        *(["se"] if squeezes else []),
        "linear_conv",
    ]
    for k, part in enumerate(parts):
        if part == "se":
            yield from [(f"{theirs}.se.conv{n}.conv", f"{ours}.{k}.fc{n}") for n in (1, 2)]
        else:
            yield from _conv_bn(f"{theirs}.{part}", f"{ours}.{k}")


def _timm_backbone(backbone: Any) -> Iterator[Row]:
    """Yield rows of any network of timm, whose option `features_only` flattens parts: `stages.0` becomes `stages_0`."""
    if backbone.features_only:
        parts = dict(backbone.model.named_modules())
        for name, _ in backbone.features_network().named_children():
            cuts = [f"{name[:k]}.{name[k + 1 :]}" for k, letter in enumerate(name) if letter == "_"]
            if name not in parts:
                yield from ((f"timm_model.{name}", f"model.{cut}") for cut in cuts if cut in parts)
            if name == "model":  # timm wraps networks whose maps it asks for
                yield "timm_model.model", "model"
    yield "timm_model", "model"


def _conv_bn(theirs: str, ours: str) -> list[Row]:
    return [(f"{theirs}.conv", f"{ours}.0"), (f"{theirs}.bn", f"{ours}.1")]


_CONVNEXT_BLOCK = {
    "depthwise_conv": "conv_dw",
    "norm": "norm",
    "pointwise_conv1": "mlp.fc1",
    "pointwise_conv2": "mlp.fc2",
    "grn.gamma": "mlp.grn.weight",
    "grn.beta": "mlp.grn.bias",
    "gamma": "gamma",
}

MMPRETRAIN: dict[str, list[Row] | Callable[[Any], Iterable[Row]]] = {
    "BEiTV2Neck": [*_beit_layers("patch_aggregation"), ("norm", "fc_norm")],
    "BEiTViT": [
        *_beit_layers("layers"),
        ("layers.{k}.attn.relative_position_bias_table", "layers.{k}.rel_pos_bias.relative_position_bias_table"),
        ("layers.{k}.attn.relative_position_index", None),
        ("rel_pos_bias.relative_position_index", None),
    ],
    "ConvNeXt": [
        ("downsample_layers.0", "stem"),
        ("downsample_layers.{s}", "stages.{s}.downsample"),
        *(
            (f"stages.{{s}}.{{k}}.{there}", f"stages.{{s}}.blocks.{{k}}.{here}")
            for there, here in _CONVNEXT_BLOCK.items()
        ),
    ],
    "EfficientNet": lambda backbone: _efficientnet(backbone.features),
    "HOGGenerator": [("weight_x", None), ("weight_y", None), ("gaussian_kernel", None)],
    "MAEPretrainDecoder": [("ln1", "decoder_norm")],
    "MoCo": [("encoder_k.module", "encoder_k"), ("encoder_k.steps", None)],
    "MobileNetV2": list(_mobilenet_v2()),
    "MobileNetV3": lambda backbone: _mobilenet_v3(backbone.features),
    "NonLinearNeck": [
        row for k in range(_NECK_LAYERS) for row in ((f"fc{k}", f"layers.{3 * k}"), (f"bn{k}", f"layers.{3 * k + 1}"))
    ],
    "TimmBackbone": _timm_backbone,
    "VQKD": [("quantize.cluster_size", None), ("quantize.embedding.initted", None)],
    "VisionTransformer": [
        ("layers.{k}.attn.gamma1.weight", "layers.{k}.gamma1"),
        ("layers.{k}.ffn.gamma2.weight", "layers.{k}.gamma2"),
    ],
}
"""Rows of MMPretrain, by class; a function makes them of an instance. What is not here has the same names there."""

_VIT_BLOCK = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.relative_position_bias_table": "rel_pos_bias.relative_position_bias_table",
    "attn": "attn",
    "mlp.fc1": "ffn.layers.0.0",
    "mlp.fc2": "ffn.layers.1",
    "ls1.gamma": "gamma1",
    "ls2.gamma": "gamma2",
    "gamma_1": "gamma1",
    "gamma_2": "gamma2",
}
OTHERS: dict[str, list[Row]] = {
    "ConvNeXt": [
        ("head.norm", "norm3"),
        ("classifier.0", "norm3"),
        ("features.0", "stem"),
        *((f"features.{2 * s}", f"stages.{s}.downsample") for s in range(1, 4)),
        *(
            (f"features.{2 * s + 1}.{{k}}.{there}", f"stages.{s}.blocks.{{k}}.{here}")
            for s in range(4)
            for there, here in (
                ("layer_scale", "gamma"),
                ("block.0", "conv_dw"),
                ("block.2", "norm"),
                ("block.3", "mlp.fc1"),
                ("block.5", "mlp.fc2"),
            )
        ),
    ],
    "VisionTransformer": [
        ("patch_embed.proj", "patch_embed.projection"),
        ("norm_pre", "pre_norm"),
        ("norm", "ln1"),
        ("fc_norm", "ln2"),
        *((f"blocks.{{k}}.{there}", f"layers.{{k}}.{here}") for there, here in _VIT_BLOCK.items()),
    ],
}
"""Rows of timm and torchvision, by class."""
_PLAIN = {
    ("timm", "ConvNeXt"): OTHERS["ConvNeXt"][:1],
    ("torchvision", "ConvNeXt"): OTHERS["ConvNeXt"][1:],
    ("timm", "VisionTransformer"): OTHERS["VisionTransformer"],
}
"""Rows by library and class of the network. Other networks, as far as they are the same, have the names here."""


class AdaptsWeights(nn.Module):
    """A module that loads what is not quite its own: weights by other names, or of another size."""

    def adapt(self, weights: dict[str, Any], prefix: str) -> None:
        """Change `weights` in place to what this module loads.

        Args:
            weights: By the names of MMPretrain, timm or torchvision, or of this module.
            prefix: How the names of this module's weights begin; others stay as they are.
        """
        forward, _ = _translations(self)
        if not forward:
            return
        known = self.state_dict().keys()
        for key in [key for key in weights if key.startswith(prefix) and key[len(prefix) :] not in known]:
            value = weights.pop(key)
            name = _translated(forward, key[len(prefix) :])
            if name is not None:
                weights[prefix + name] = value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.adapt(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[arg-type]


def adapted(module: nn.Module, weights: dict[str, Any]) -> dict[str, Any]:
    """Return `weights` as `module` and its parts load them: by its names, and of its sizes where they can be resized."""
    found = dict(weights)
    for prefix, part in _parts(module):
        if isinstance(part, AdaptsWeights):
            part.adapt(found, prefix)
    return found


def mmpretrain_names(module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a component or a model by MMPretrain's names, to be saved with `torch.save` and loaded there.

    The tensors are those of `module`, not copies.
    """
    weights: dict[str, Tensor] = dict(module.state_dict())
    for prefix, part in reversed(list(_parts(module))):
        _, back = _translations(part)
        if back:
            inside = {
                key: f"{prefix}{_translated(back, key[len(prefix) :])}" for key in weights if key.startswith(prefix)
            }
            weights = {inside.get(key, key): value for key, value in weights.items()}
    return weights


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules(remove_duplicate=False):
        yield f"{name}." if name else "", part


def plain_names(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of the backbone of a model, of MMPretrain or of ours, by the names of a plain network.

    Args:
        network: A ResNet, ConvNeXt, MobileNetV2 or VisionTransformer of torchvision or timm; names for others stay as they are.
            Its 1 x 1 convolutions take linear layers, and the other way round.
        weights: By the names of a model: those of its `backbone` are taken.
    """
    library, name = type(network).__module__.partition(".")[0], type(network).__name__
    theirs = MMPRETRAIN.get(name, [])
    forward = [] if callable(theirs) else [_compiled(there, here) for there, here in theirs]
    back = [_compiled(here, there) for there, here in _PLAIN.get((library, name), []) if here is not None]
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        if key.startswith("backbone."):
            here = _translated(forward, re.sub(r"^backbone\.(timm_model\.|model\.)?", "", key))
            found |= {} if here is None else {str(_translated(back, here)): value}
    for key, like in network.state_dict().items():
        if key in found and found[key].ndim != like.ndim and found[key].numel() == like.numel():
            found[key] = found[key].reshape(like.shape)
    return found


_Translation = list[tuple[re.Pattern[str], str | None]]


def _translations(part: nn.Module) -> tuple[_Translation, _Translation]:
    """Return what translates names of others for `part`, and what translates its names to MMPretrain's."""
    forward: _Translation = []
    back: _Translation = []
    for owner in type(part).__mro__:
        if not owner.__module__.startswith("widefield."):  # someone else's class of that name
            continue
        theirs = MMPRETRAIN.get(owner.__name__, [])
        rows = list(theirs(part)) if callable(theirs) else theirs
        forward += [_compiled(there, here) for there, here in [*rows, *OTHERS.get(owner.__name__, [])]]
        back += [_compiled(here, there) for there, here in rows if here is not None]
    return forward, back


@cache
def _compiled(name: str, becomes: str | None) -> tuple[re.Pattern[str], str | None]:
    pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(name))
    return re.compile(rf"{pattern}(?=\.|$)"), None if becomes is None else re.sub(r"{(\w)}", r"\\g<\1>", becomes)


def _translated(translation: _Translation, name: str) -> str | None:
    for pattern, becomes in translation:
        found = pattern.match(name)
        if found:
            return None if becomes is None else found.expand(becomes) + name[found.end() :]
    return name
