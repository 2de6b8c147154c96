"""`StreamingConstructor`: a streamed network from the arguments that users of lightstream know."""

import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from widefield.registry import suggestion
from widefield.streaming import StreamingCNN

_logger = logging.getLogger(__name__)

Callback = Callable[[nn.Module], Any]


class StreamingConstructor:
    """Makes a `StreamingCNN` of `model`.

    Args:
        model: The network, of operations that are local in space.
        tile_size: See `StreamingCNN`.
        verbose: Print the table of layers, with what a tiling with halos would lose at their borders, for an image of one tile.
        deterministic, saliency, copy_to_gpu: See `StreamingCNN`.
        normalize_on_gpu: Normalise each tile on the device by `mean` and `std`, ImageNet's if they are not given. False: give the
            network the image as it is. None: normalise if `mean` and `std` are given.
        mean, std: Per channel, for values from 0 to 1.
        statistics_on_cpu, tile_cache, add_keep_modules: Without effect, and said once in the log: the geometry of the layers is
            computed without running them, so there is nothing to place, to cache or to keep.
        before_streaming_init_callbacks: Called in order with the model before it is prepared. What they do to its weights is
            undone, what they do to its layers stays.
        after_streaming_init_callbacks: Called in order with the model when it is prepared.
        options: Others of `StreamingCNN`.
    """

    def __init__(
        self,
        model: nn.Module,
        tile_size: int | tuple[int, int | None] | None,
        verbose: bool = False,
        deterministic: bool = False,
        saliency: bool = False,
        copy_to_gpu: bool = False,
        statistics_on_cpu: bool | None = None,
        normalize_on_gpu: bool | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        tile_cache: Any = None,
        add_keep_modules: Sequence[type[nn.Module]] | None = None,
        before_streaming_init_callbacks: Sequence[Callback] | None = None,
        after_streaming_init_callbacks: Sequence[Callback] | None = None,
        **options: Any,
    ) -> None:
        self.model = model
        self.verbose = verbose
        if normalize_on_gpu is False:
            mean = std = None
        elif normalize_on_gpu and mean is None and std is None:
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        self.before_streaming_init_callbacks = _callbacks("before", before_streaming_init_callbacks)
        self.after_streaming_init_callbacks = _callbacks("after", after_streaming_init_callbacks)
        check_options(StreamingConstructor, options)
        self.options = {
            "tile_size": tile_size,
            "deterministic": deterministic,
            "saliency": saliency,
            "copy_to_gpu": copy_to_gpu,
            "mean": mean,
            "std": std,
            **options,
        }
        for name, given in (
            ("statistics_on_cpu", statistics_on_cpu is not None),
            ("tile_cache", tile_cache is not None),
            ("add_keep_modules", add_keep_modules is not None),
        ):
            if given:
                without_effect(name)

    def prepare_streaming_model(self) -> StreamingCNN:
        """The streamed network; the callbacks run here."""
        if self.before_streaming_init_callbacks:
            weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            for callback in self.before_streaming_init_callbacks:
                callback(self.model)
            _restore(self.model, weights)
        network = StreamingCNN(self.model, **self.options)
        for callback in self.after_streaming_init_callbacks:
            callback(self.model)
        if self.verbose:
            print(_table(network))
        return network


_PASSED_ON = {*inspect.signature(StreamingConstructor).parameters, *inspect.signature(StreamingCNN).parameters}
_PASSED_ON -= {"model", "module", "options"}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_options(kind: type, options: Iterable[str]) -> None:
    """Raise TypeError for the name of an option that neither a constructor of `kind` nor the engine takes.

    Called before weights are downloaded.
    """
    owners = [owner for owner in kind.__mro__ if owner.__module__.startswith("widefield.")]
    known = _PASSED_ON.union(*(inspect.signature(owner).parameters for owner in owners)) - {"options"}
    for name in sorted(set(options) - known):
        raise TypeError(f"there is no argument {name!r}; {suggestion(name, known)}")


def by_default(trunk_alone: bool, options: dict[str, Any]) -> dict[str, Any]:
    """Return how a ready network normalises unless `options` say otherwise: by ImageNet's mean and std.

    `trunk_alone`: float images are from 0 to 255, as lightstream 1.x takes them.
    """
    scaled = trunk_alone and options.get("normalize_on_gpu") is not False
    return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "value_range": (0, 255) if scaled else None}


@cache
def without_effect(name: str) -> None:
    """Say once that an argument or method is accepted, and that nothing depends on it."""
    _logger.info(
        "%s has no effect: nothing is measured by running tiles, so there is nothing to place, cache or keep", name
    )


def _callbacks(when: str, given: Sequence[Callback] | None) -> list[Callback]:
    if given is not None and (callable(given) or not all(map(callable, given))):
        raise ValueError(f"{when}_streaming_init_callbacks={given!r:.100} must be a list of functions of the model")
    return list(given or ())


@torch.no_grad()
def _restore(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy `weights` back to the tensors of these names that are still there in their shape."""
    for name, tensor in model.state_dict().items():
        if name in weights and tensor.shape == weights[name].shape:
            tensor.copy_(weights[name])


def _table(network: StreamingCNN) -> str:
    """The plan for an image of one tile, or of 1024 x 1024 pixels."""
    convolution = next((part for part in network.modules() if isinstance(part, nn.Conv2d)), None)
    channels = 3 if convolution is None else convolution.in_channels
    height, width = network.tile_size or (1024, 1024)
    try:
        return str(network.plan((channels, height, width or height)))
    except ValueError as error:  # the network takes no image as small as this tile
        return f"no table of layers for an image of one tile: {error}"


def default_statistics(
    mean: Sequence[float] | None, std: Sequence[float] | None, in_channels: int
) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    """Return mean and standard deviation of each channel, those of ImageNet where neither is given and there are three channels."""
    if mean is None and std is None and in_channels == len(IMAGENET_MEAN):
        return IMAGENET_MEAN, IMAGENET_STD
    return mean, std
