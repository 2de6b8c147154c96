"""Maps of the evidence for a class: class activation maps of streamed classifiers, Grad-CAM of models of components."""

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn

from widefield.components.data_sample import DataSample
from widefield.components.models.features import background_of
from widefield.components.models.image_classifier import ImageClassifier
from widefield.data.datasets import as_batch
from widefield.errors import WidefieldError
from widefield.modules import ImageNetClassifier
from widefield.streaming import Cells

_log = logging.getLogger(__name__)


class NoMapError(WidefieldError, ValueError):
    """A layer whose output says nothing of places in the image."""


def grad_cam(
    model: ImageClassifier, picture: Any, layer: str | None = None, class_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scores of the classes of one image, and the map of the evidence for one of them at a layer.

    The map is the sum over channels k of w_k * A_k, with A the output of the layer and w_k the gradient of the class score with
    respect to A_k, summed over positions: Selvaraju et al., Grad-CAM, 2017, equation 1, before its ReLU and without the division by
    the number of positions. The output may be a map (1, C, h, w), or the tokens (1, L, C) of a vision transformer.

    Args:
        model: A classifier; its mode flags are left as they are, so call `eval()` first.
        picture: A tensor (C, H, W), or a lazily read image.
        layer: Name of a part, such as `backbone.layer3`. None takes the last map of the backbone, which may stream, or, of a vision
            transformer, the tokens that the last attention gets.
        class_index: The class to explain; None takes the one of the highest score.

    Returns:
        Scores of shape (classes,), as the head predicts them, and the map of shape (h, w), on the CPU. Both need no gradient.

    Raises:
        NoMapError: The layer's output is neither a map nor such tokens.
        ValueError: There is no such layer, the image runs not through it, or the backbone streams and a layer inside is asked for.
    """
    picture = picture.to(model.device) if isinstance(picture, Tensor) else picture
    inputs, _ = model.preprocess((as_batch([picture]), [DataSample()]))
    if layer is None:
        layer = _last_attention(model.backbone)
    if layer is None:
        activation, features = _last_map(model, inputs)
    else:
        activation, features = _at_layer(model, inputs, layer)
    with torch.enable_grad():
        logits = model.head(features)
        sample = model.head.predict(features)[0]
        index = int(sample.pred_score.argmax()) if class_index is None else class_index
        if not 0 <= index < logits.shape[1]:
            raise ValueError(f"there is no class {index}; there are {logits.shape[1]}, from 0")
        (gradient,) = torch.autograd.grad(logits[0, index], activation, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"the score does not depend on the output of {layer}; name a layer that the image runs through"
        )
    weights = _as_map(gradient, layer, model.backbone).sum(dim=(1, 2), keepdim=True)
    evidence = (weights * _as_map(activation.detach(), layer, model.backbone)).sum(dim=0)
    return sample.pred_score.detach().float().cpu(), evidence.float().cpu()


def _last_map(model: ImageClassifier, inputs: Any) -> tuple[Tensor, Any]:
    """The last map of the backbone as a leaf of autograd, and what the head gets of it."""
    with torch.no_grad():
        found = model.extract_feat(inputs, "backbone")
    maps = found[0] if isinstance(found, list) else found
    last = maps[-1]
    if last.ndim != 4:
        raise NoMapError(
            f"{type(model.backbone).__name__} gives features of the shape {tuple(last.shape)}, which have no places; name a layer "
            "with a map, or let the backbone give its map (gap_before_final_norm=False, out_type=featmap) and pool in the neck"
        )
    leaf = last.detach().requires_grad_()
    with torch.enable_grad():
        features = (*maps[:-1], leaf)
        return leaf, model.neck_features(features, background_of(inputs[0]))


def _at_layer(model: ImageClassifier, inputs: Any, layer: str) -> tuple[Tensor, Any]:
    """The output of a layer, and what the head gets of it, with the graph between them."""
    if model.reads_tiles:
        raise ValueError(f"the backbone streams, so that {layer} never has its whole output; leave the layer away")
    try:
        part = model.get_submodule(layer)
    except AttributeError:
        names = ", ".join(name for name, _ in model.named_children())
        raise ValueError(
            f"there is no layer {layer!r}; its name begins with one of {names}, as in backbone.layer3"
        ) from None
    outputs: list[Tensor] = []

    def keep(part: nn.Module, arguments: Any, output: Any) -> Any:
        several = isinstance(output, (tuple, list))
        last = output[-1] if several else output
        outputs.append(last if last.requires_grad else last.detach().requires_grad_())
        handed_on = outputs[-1].clone()  # what follows may change it in place
        return type(output)([*output[:-1], handed_on]) if several else handed_on

    hook = part.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            features = model.extract_feat(inputs)
    finally:
        hook.remove()
    if not outputs:
        raise ValueError(f"the image does not run through {layer}; name a layer that it runs through")
    return outputs[-1], features


def _last_attention(backbone: nn.Module) -> str | None:
    """The norm before the last attention of a vision transformer that gives no map."""
    layers = getattr(backbone, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(layers[-1], "ln1"):
        return None
    if getattr(backbone, "out_type", "featmap") == "featmap":
        return None
    return f"backbone.layers.{len(layers) - 1}.ln1"


def _as_map(output: Tensor, layer: str | None, backbone: nn.Module) -> Tensor:
    """(C, h, w) of a map (1, C, h, w), or of tokens (1, L, C): those of the patches, row by row, behind some others."""
    if output.ndim == 4:
        return output[0]
    patches = output.shape[1] - int(getattr(backbone, "num_extra_tokens", 1)) if output.ndim == 3 else 0
    rows, columns = getattr(backbone, "patch_resolution", (0, 0))
    if rows * columns != patches:
        rows = columns = math.isqrt(max(patches, 0))
    if patches < 1 or rows * columns != patches:
        raise NoMapError(
            f"the output of {layer} has the shape {tuple(output.shape)}, which is no map of the image; name another layer"
        )
    return output[0, -patches:].T.unflatten(1, (rows, columns))


def class_activation(model: ImageNetClassifier, image: Any, class_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities of the classes of one image, and the map of the evidence for one of them.

    The map is Grad-CAM's before its final ReLU: the sum over channels k of w_k * A_k, with A the trunk's map and w_k the
    gradient of the class logit with respect to A_k, summed over positions. For a head of global pooling, average or
    maximum, and one linear layer, w is that layer's row of weights and the map is the class activation map itself.

    Selvaraju et al., Grad-CAM, 2017, equation 1; Zhou et al., Learning Deep Features for Discriminative Localization, 2016.

    Args:
        model: A classifier; its mode flags are left as they are, so call `eval()` first.
        image: One lazy image, or a tensor (1, C, H, W).
        class_index: The class to explain; None takes the most probable one.

    Returns:
        Probabilities of shape (classes,) and the map of shape (h, w), on the CPU. Both need no gradient.

    Examples:
        >>> model = wf.models.Classifier("resnet10_w16", ["benign", "malignant"], tile_size=64).eval()
        >>> probabilities, evidence = class_activation(model, torch.rand(1, 3, 128, 96))
        >>> probabilities.shape, evidence.shape
        (torch.Size([2]), torch.Size([4, 3]))
    """
    with torch.no_grad():
        features = model.trunk_map(image)
    features.requires_grad_()
    with torch.enable_grad():
        logits = model.forward_head_over(features, background_of(image))
        probabilities = model.predictions(logits.detach())[0]
        index = int(probabilities.argmax()) if class_index is None else class_index
        (gradient,) = torch.autograd.grad(logits[0, index], features)
    weights = gradient.sum(dim=(2, 3), keepdim=True)
    evidence = (weights * features.detach()).sum(dim=1)[0]
    return probabilities.float().cpu(), evidence.float().cpu()


@torch.no_grad()  # as the maps were made, so that the network is traced once
def cells_of(
    model: ImageNetClassifier | ImageClassifier, image: Any, evidence: Tensor, layer: str | None = None
) -> Cells:
    """Return the places in an image that the entries of a map of evidence look at: the middles of their receptive fields.

    Where the engine cannot follow the network up to the map, which is said in the log, the map is taken to cover the image evenly.

    Args:
        model: The classifier that gave the evidence.
        image: The lazy image or the tensor (..., H, W) that it got.
        evidence: (h, w), see `class_activation` and `grad_cam`.
        layer: As for `grad_cam`.
    """
    (rows, columns), (height, width) = evidence.shape, image.shape[-2:]
    if isinstance(model, ImageNetClassifier):
        network, divisor = model.stream_network, 1
    else:
        network, divisor = model.traced, getattr(model.data_preprocessor, "pad_size_divisor", 1)
        layer = layer or _last_attention(model.backbone)
    padded = (-(-height // divisor) * divisor, -(-width // divisor) * divisor)
    try:
        found = network.cells((image.shape[-3], *padded), layer)
    except Exception as error:
        _log.debug("the network cannot be traced", exc_info=True)
        reason = f"{type(error).__name__}: {error}"
    else:
        if found.size == (rows, columns):
            return found
        reason = f"its last map that can be followed has {found.size[0]} x {found.size[1]} entries"
    _log.warning("a heatmap of %d x %d entries is taken to cover the image evenly: %s", rows, columns, reason)
    stride = height / rows, width / columns
    return Cells((rows, columns), ((stride[0] - 1) / 2, (stride[1] - 1) / 2), stride)
