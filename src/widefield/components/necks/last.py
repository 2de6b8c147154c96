"""Which of the features a neck works on."""

from collections.abc import Sequence

from torch import Tensor


def last_features(inputs: Tensor | Sequence[Tensor]) -> Tensor:
    """The features of the last stage: the last of several, or the tensor itself.

    Raises:
        TypeError: The inputs are neither tensors nor a tensor.
    """
    last = inputs[-1] if isinstance(inputs, (tuple, list)) and inputs else inputs
    if not isinstance(last, Tensor):
        raise TypeError(f"the inputs of a neck are a tuple of tensors or a tensor, not {type(inputs).__name__}")
    return last
