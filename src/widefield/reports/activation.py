"""Class activation maps: where in the image a class was seen."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from widefield.modules import ImageNetClassifier


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
    """
    with torch.no_grad():
        features = model.stream_network(image)
    features.requires_grad_()
    with torch.enable_grad():
        logits = model.forward_head(features)
        probabilities = model.predictions(logits.detach())[0]
        index = int(probabilities.argmax()) if class_index is None else class_index
        (gradient,) = torch.autograd.grad(logits[0, index], features)
    weights = gradient.sum(dim=(2, 3), keepdim=True)
    evidence = (weights * features.detach()).sum(dim=1)[0]
    return probabilities.float().cpu(), evidence.float().cpu()


def peak(evidence: np.ndarray, size: tuple[int, int]) -> tuple[int, int]:
    """Where a map (h, w) that covers an image of `size` (height, width) is greatest: (y, x) in pixels of the image."""
    row, column = np.unravel_index(int(evidence.argmax()), evidence.shape)
    return int((row + 0.5) * size[0] / evidence.shape[0]), int((column + 0.5) * size[1] / evidence.shape[1])
