"""Heads that give a map: scores of each class, or numbers, at each position."""

from collections.abc import Sequence
from typing import Annotated, Any

from torch import Tensor, nn
from torch.nn import functional

from widefield.components.component import Component
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS, Range


@MODELS.register_module()
class PyramidHead(Component):
    """Maps of several strides, brought to the same channels and to the size of the finest, added up, and classified.

    The decoder of Kirillov et al., Panoptic Feature Pyramid Networks, 2019, https://arxiv.org/abs/1901.02446, figure 3, with a
    projection and one bilinear resizing for each level.

    Args:
        num_classes: Channels of the result.
        in_channels: Channels of each map, of the backbone or the neck.
        width: Channels between.
        kwargs: Those of `Component`.

    Example:
        >>> PyramidHead(3, [4, 8])([torch.rand(1, 4, 32, 24), torch.rand(1, 8, 16, 12)]).shape
        torch.Size([1, 3, 32, 24])
    """

    component_kind = "head"

    def __init__(
        self,
        num_classes: Annotated[int, Range(1)],
        in_channels: Sequence[int],
        width: Annotated[int, Range(1)] = 128,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.projections = nn.ModuleList(nn.Conv2d(count, width, 1) for count in in_channels)
        self.refine = nn.Conv2d(width, width, 3, padding=1)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        """Return a map (N, num_classes, h, w) of the size of the first of `feats`, which are (N, C, h, w), finest first.

        Raises:
            WrongArgumentError: They are not as many as `in_channels`, or a map has other channels.
        """
        given = [feats.shape[1]] if isinstance(feats, Tensor) else [one.shape[1] for one in feats]
        expected = [project.in_channels for project in self.projections]
        if given != expected:
            raise WrongArgumentError(f"the head has in_channels={expected}, and gets maps of {given} channels")
        levels = [project(level) for project, level in zip(self.projections, feats, strict=True)]
        size = levels[0].shape[-2:]
        total = levels[0]
        for level in levels[1:]:
            total = total + functional.interpolate(level, size=size, mode="bilinear", align_corners=False)
        logits: Tensor = self.classify(functional.relu(self.refine(functional.relu(total))))
        return logits
