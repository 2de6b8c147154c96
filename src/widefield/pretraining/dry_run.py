"""A wrapper, tried on one batch of noise before anything is written: what it returns, and that gradients reach its weights."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.wrapping import METHODS_OF_A_WRAPPER, evaluating

BATCH = 2
ENOUGH = 256
"""A view with a longer side than this is tried smaller first: where pooling leaves one position, its size does not matter."""
ERRORS = (RuntimeError, AssertionError, AttributeError, LookupError, TypeError)
"""Errors that a wrapper may raise of views that do not suit it; a ValueError says so itself."""


def dry_run(embedding: EmbeddingModel, channels: int, sizes: Sequence[tuple[int, int]]) -> int:
    """Run the wrapper on views of `sizes` (height, width) with `channels`; the numbers in an embedding.

    No weight, gradient, statistic or random state is changed.

    Raises:
        ValueError: It returns something else than the contract of a wrapper says, embeddings of the views differ in size, or
            nothing trains.
    """
    wrapper: Any = embedding.wrapped_model
    _check_model(wrapper)
    numbers: dict[tuple[int, int], int] = {}
    with evaluating(embedding), torch.random.fork_rng(devices=[]):
        for size in dict.fromkeys(sizes):
            small = tuple(min(n, ENOUGH) for n in size)
            pooled = _run(embedding, channels, small)  # type: ignore[arg-type]
            if small != size and pooled.shape[2:] != (1, 1):
                pooled = _run(embedding, channels, size)
            numbers[size] = pooled[0].numel()
            _check_gradients(wrapper, pooled)
    if len(set(numbers.values())) > 1:
        counts = ", ".join(f"{count} of a view of {h} x {w}" for (h, w), count in numbers.items())
        raise ValueError(
            f"forward_pool leaves different numbers: {counts}; pool all views to the same height and width"
        )
    return next(iter(numbers.values()))


def _check_model(wrapper: Any) -> None:
    model, dim = wrapper.get_model(), wrapper.feature_dim()
    if not isinstance(model, nn.Module):
        raise ValueError(f"get_model() must return a torch.nn.Module, got {type(model).__name__}")
    if model is not wrapper and all(callable(getattr(model, name, None)) for name in METHODS_OF_A_WRAPPER):
        raise ValueError(
            f"get_model() returns a {type(model).__name__}, which is a wrapper itself; give that, without another around it"
        )
    types = {p.dtype for p in wrapper.parameters() if p.is_floating_point()} - {torch.float32}
    if types:
        told = ", ".join(sorted(str(one).removeprefix("torch.") for one in types))
        raise ValueError(
            f"the model has weights of {told}, and those that train are kept as float32; give model.float(), and "
            "precision='bf16-mixed' or '16-mixed' to compute in 16 bits, '64-true' in 64"
        )
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
        raise ValueError(f"feature_dim() must return a positive integer, got {dim!r}")


def _run(embedding: EmbeddingModel, channels: int, size: tuple[int, int]) -> Tensor:
    """Pooled embeddings of noise."""
    wrapper: Any = embedding.wrapped_model
    weight = next(embedding.parameters(), torch.empty(0))
    views = torch.rand(BATCH, channels, *size, device=weight.device)
    shape = tuple(views.shape)
    what = f"forward_features failed on views of shape {shape}{_other_channels(wrapper, channels)}"
    features = _tried(embedding.features, views, what)
    _check_output("forward_features", features, "features", wrapper.feature_dim())
    shape = tuple(features["features"].shape)
    pooled = _tried(wrapper.forward_pool, features, f"forward_pool failed on features of shape {shape}")
    _check_output("forward_pool", pooled, "pooled_features", wrapper.feature_dim())
    return embedding.pooled(features)


def _other_channels(wrapper: nn.Module, channels: int) -> str:
    """Return what to do where the first convolution takes another number of channels; an empty text where it does not."""
    first = next((part for part in wrapper.modules() if isinstance(part, nn.Conv2d)), None)
    if first is None or first.in_channels == channels:
        return ""
    return (
        f", and the first layer of the model takes {first.in_channels} channels; give a model for {channels}, or a name, by which "
        'one is made for them: "torchvision/resnet18"'
    )


def _tried(function: Callable[[Any], Any], given: Any, what: str) -> Any:
    try:
        return function(given)
    except ERRORS as error:
        text = str(error).partition("\n")[0]
        kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{text}") from error


def _check_output(method: str, out: Any, key: str, channels: int) -> None:
    if not isinstance(out, dict) or key not in out:
        given = f"a dict with {', '.join(map(repr, out)) or 'nothing'}" if isinstance(out, dict) else type(out).__name__
        raise ValueError(f'{method} must return a dict with an entry "{key}", got {given}')
    tensor = out[key]
    shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
    if not isinstance(tensor, Tensor) or tensor.ndim != 4 or tensor.shape[0] != BATCH:
        hint = ""
        if isinstance(tensor, Tensor) and tensor.ndim == 2:
            hint = "; add [:, :, None, None]"
        raise ValueError(
            f'"{key}" of {method} must be a tensor of shape ({BATCH}, {channels}, height, width) for a batch of {BATCH}: '
            f"got {shape}{hint}"
        )
    if tensor.shape[1] != channels:
        raise ValueError(
            f'feature_dim() returns {channels}, but "{key}" of {method} has {tensor.shape[1]} channels (its shape is {shape}); '
            "they must be equal"
        )


def _check_gradients(wrapper: nn.Module, pooled: Tensor) -> None:
    trained = [p for p in wrapper.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient, so there is nothing to train")
    if not pooled.requires_grad:
        raise ValueError(
            "the output of the model has no gradient, so nothing would be trained: is there a torch.no_grad() or a detach() in "
            "forward_features or forward_pool?"
        )
    if all(gradient is None for gradient in torch.autograd.grad(pooled.sum(), trained, allow_unused=True)):
        raise ValueError("no gradient of the output reaches a parameter of the model, so nothing would be trained")
