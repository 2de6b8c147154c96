"""Classifiers of instances: encoders that see a patch at a time, and heads by their names."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from widefield.components.necks.instance_attention import ABMILX, TransMIL
from widefield.components.necks.instance_pooling import (
    CLAM,
    DSMIL,
    GatedAttentionPooling,
    InstancePooling,
    MaxPooling,
    MeanPooling,
)
from widefield.models.lora import add_adapters
from widefield.models.networks import TIMM_PREFIX, Weights, make_timm
from widefield.registry import suggestion

PATCHES_PREFIX = "patches:"
FEATURES = "features"
"""Name of a model without an encoder: its images are files of features, see `widefield.images.features`."""
POOLINGS: Mapping[str, Callable[[int, int], InstancePooling]] = {
    "mean": MeanPooling,
    "max": MaxPooling,
    "abmil": GatedAttentionPooling,
    "clam": CLAM,
    "clam-mb": partial(CLAM, branches="multi"),
    "dsmil": DSMIL,
    "transmil": TransMIL,
    "abmilx": ABMILX,
}
"""Heads by name: called with the channels of the map and the number of outputs."""


def is_patches(name: str) -> bool:
    """Return True if a model of that name encodes patches."""
    return name.startswith(PATCHES_PREFIX)


def make_head(pooling: str, channels: int, outputs: int) -> InstancePooling:
    """Return the head of a name of `POOLINGS`; "average" is the mean.

    Raises:
        ValueError: There is no such name.
    """
    made = POOLINGS.get("mean" if pooling == "average" else pooling)
    if made is None:
        raise ValueError(f"pooling={pooling!r}: {suggestion(pooling, POOLINGS)}")
    return made(channels, outputs)


def make_encoder(name: str, weights: Weights, in_channels: int, patch_size: int, lora: int | None) -> nn.Module:
    """Return the timm network `patches:timm/NAME`, without its classifier and with adapters of that rank, as a `Local` of patches.

    Raises:
        ValueError: There is no such network, weights don't belong to it, or it has nothing to adapt.
        OSError: Weights cannot be downloaded or read.
    """
    from widefield.streaming import Local

    short = name.removeprefix(PATCHES_PREFIX)
    if not short.startswith(TIMM_PREFIX):
        raise ValueError(
            f"model {name!r}: patches are encoded by networks of timm; give {PATCHES_PREFIX}{TIMM_PREFIX}NAME"
        )
    net: Any = make_timm(short, 0, weights, in_chans=in_channels)
    if hasattr(net, "set_input_size") and tuple(net.patch_embed.img_size or ()) != (patch_size, patch_size):
        net.set_input_size(img_size=(patch_size, patch_size))
    if lora is not None:
        add_adapters(net, lora)
    return Local(net, patch_size)
