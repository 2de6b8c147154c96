"""Labels and predictions of one image."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Values = int | Sequence[Any] | np.ndarray | Tensor


class DataSample:
    """Labels and scores of one image, and whatever else belongs to it.

    Attributes:
        gt_label, pred_label: Class indices, int64 of shape (k,).
        gt_score, pred_score: A score per class, of shape (num_classes,).
        num_classes: Set by the first score.

    Args:
        metainfo: More attributes, such as `img_path`, in a dictionary.
        fields: More attributes, by name.
    """

    def __init__(self, metainfo: Mapping[str, Any] | None = None, **fields: Any) -> None:
        self.__dict__.update(metainfo or {}, **fields)

    def set_gt_label(self, value: Values) -> "DataSample":
        """Set the true classes."""
        self.gt_label = _label(value)
        return self

    def set_pred_label(self, value: Values) -> "DataSample":
        """Set the predicted classes."""
        self.pred_label = _label(value)
        return self

    def set_gt_score(self, value: Values) -> "DataSample":
        """Set the true score of every class: a one-hot or mixed label."""
        self.gt_score = self._score(value)
        return self

    def set_pred_score(self, value: Values) -> "DataSample":
        """Set the predicted score of every class."""
        self.pred_score = self._score(value)
        return self

    def set_mask(self, value: np.ndarray | Tensor) -> "DataSample":
        """Set the mask of masked image modelling."""
        if not isinstance(value, (np.ndarray, Tensor)):
            raise TypeError(f"a mask is a tensor or an array, not a {type(value).__name__}")
        self.mask = torch.as_tensor(value)
        return self

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute `name`, or `default` if it is not set."""
        return self.__dict__.get(name, default)

    def set_field(self, value: Any, name: str) -> "DataSample":
        """Set the attribute `name`."""
        self.__dict__[name] = value
        return self

    def pop(self, name: str, *default: Any) -> Any:
        """Remove the attribute `name` and return it, or `default` if it is not set."""
        return self.__dict__.pop(name, *default)

    def keys(self) -> list[str]:
        """Return the names of all attributes that are set."""
        return list(self.__dict__)

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes that are set, by name."""
        return dict(self.__dict__)

    def __contains__(self, name: str) -> bool:
        return name in self.__dict__

    def __repr__(self) -> str:
        return f"DataSample({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"

    def _score(self, value: Values) -> Tensor:
        score = torch.as_tensor(value)
        if score.ndim != 1:
            raise ValueError(f"scores have the shape {tuple(score.shape)}; give one per class, of shape (num_classes,)")
        known = self.__dict__.setdefault("num_classes", len(score))
        if len(score) != known:
            raise ValueError(f"there are {len(score)} scores, and there were {known} classes before")
        return score


def _label(value: Values) -> Tensor:
    label = torch.as_tensor(value)
    if label.is_floating_point() or label.ndim > 1:
        raise ValueError(f"labels are class indices, one or a list of them, not {value!r}")
    return label.long().reshape(-1)
