"""Masks where a network takes them: whether it does is tried out on one cell of an image."""

import copy
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from widefield.components.models.features import background_of
from widefield.components.models.image_classifier import SEVERAL_MAPS, ImageClassifier
from widefield.images import Mask
from widefield.modules import BaseModule
from widefield.pretraining.wrapping import evaluating

_log = logging.getLogger(__name__)
_WHOLE = "needs a network that is streamed as a whole"
"""The words of the engine for a network that takes no mask."""


def keep_background_if_usable(model: nn.Module, image: Any) -> bool:
    """Take the background from an image whose model takes no masks, which is logged once. Return True if its background is kept.

    Args:
        model: Its mode is left as it is.
        image: Whatever the model gets; a file may have a background.

    Raises:
        ValueError: The mask was asked for by name.
    """
    background = background_of(image)
    if background is None:
        return False
    known = model.__dict__.setdefault("_takes_masks", [])
    if not known:
        known.append(_refusal(model, image))
        if known[0] is not None and not background.required:
            _log.info("background is not left out: %s", known[0])
    if known[0] is None:
        return True
    if background.required:
        raise ValueError(f"{known[0]}; --foreground none (foreground='none') takes whole images")
    image.background = None
    return False


@torch.no_grad()
def _refusal(model: Any, image: Any) -> ValueError | None:
    """Return why a model takes no masks; None if it takes them."""
    streams = isinstance(model, BaseModule) or (isinstance(model, ImageClassifier) and model.reads_tiles)
    if not streams:
        return ValueError(f"a mask {_WHOLE}, and this {type(model).__name__} does not stream")
    tried, background = copy.copy(image), image.background
    rows, columns = np.nonzero(background.mask.cells)
    one = np.zeros_like(background.mask.cells)
    one[rows[len(rows) // 2], columns[len(rows) // 2]] = True
    tried.background = replace(background, mask=Mask(one))
    try:
        with evaluating(model):
            model([tried]) if isinstance(model, BaseModule) else model.extract_feat([tried])
    except ValueError as error:
        if not any(text in str(error) for text in (_WHOLE, SEVERAL_MAPS)):
            raise
        return error
    return None
