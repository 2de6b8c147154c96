"""What linear layers of heads are given."""

from torch import Tensor

from widefield.components.errors import WrongArgumentError


def vectors(features: Tensor, in_channels: int) -> Tensor:
    """`features` themselves, of shape (N, in_channels).

    Raises:
        WrongArgumentError: They have another shape; a linear layer would take maps whose width happens to fit.
    """
    if features.ndim != 2:
        raise WrongArgumentError(
            f"the head gets features of shape {tuple(features.shape)}, expected (N, {in_channels}); "
            "put a neck before it that pools maps, such as {type: GlobalAveragePooling}"
        )
    if features.shape[1] != in_channels:
        raise WrongArgumentError(
            f"in_channels={in_channels} of the head, and it gets features of {features.shape[1]} channels; "
            f"give in_channels={features.shape[1]}"
        )
    return features
