"""Labels of images, in each form that losses take."""

import torch
from torch import Tensor
from torch.nn import functional

from widefield.components.errors import WrongArgumentError


def label_scores(label: Tensor, num_classes: int) -> Tensor:
    """Labels as a score per class.

    Args:
        label: Class indices, integers of shape (N,) or (N, 1), or scores (N, C), one-hot or mixed.
        num_classes: C.

    Returns:
        Scores of shape (N, C); float, unless scores of another floating type were given.

    Raises:
        WrongArgumentError: The labels are neither.
    """
    if label.ndim == 2 and label.shape[1] == num_classes:
        return label if label.is_floating_point() else label.to(torch.get_default_dtype())
    if not label.is_floating_point() and (label.ndim == 1 or label.shape[1:] == (1,)):
        indices = label.reshape(-1).long()
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < num_classes:
            raise WrongArgumentError(
                f"there are labels from {int(indices.min())} to {int(indices.max())}, and {num_classes} classes, from 0"
            )
        return functional.one_hot(indices, num_classes).to(torch.get_default_dtype())
    raise WrongArgumentError(
        f"labels of type {label.dtype} have the shape {tuple(label.shape)}; give class indices, integers of shape (N,), "
        f"or scores of shape (N, {num_classes})"
    )
