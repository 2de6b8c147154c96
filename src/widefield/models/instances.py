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
from widefield.models.networks import Weights
from widefield.models.patch_encoder import PatchEncoder
from widefield.modules.constructor import IMAGENET_MEAN
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


def make_encoder(
    name: str,
    weights: Weights,
    in_channels: int,
    patch_size: int,
    lora: int | None,
    normalises: bool,
) -> PatchEncoder:
    """Return the encoder of patches by the timm network `patches:timm/NAME`, with adapters of rank `lora` if it is given.

    Args:
        name, weights, in_channels: The network; its weights are frozen where it has adapters.
        patch_size: Side of a patch in pixels.
        lora: See `add_adapters`.
        normalises: Normalise patches as timm says for the network. False, and other than 3 channels: take them as they are.

    Raises:
        ValueError: There is no such network, weights don't belong to it, or it has nothing to adapt.
        OSError: Weights cannot be downloaded or read.
    """
    normalised = normalises and in_channels == len(IMAGENET_MEAN)
    encoder = PatchEncoder(
        name.removeprefix(PATCHES_PREFIX),
        patch_size,
        weights=weights,  # type: ignore[arg-type]
        mean=None if normalised else (0.0,) * in_channels,
        std=None if normalised else (1.0,) * in_channels,
        options={"in_chans": in_channels},
    )
    if lora is not None:
        add_adapters(network_of(encoder), lora)
    return encoder


def network_of(encoder: nn.Module) -> Any:
    """Return the network in a `PatchEncoder`."""
    return encoder.get_submodule("module.network")
