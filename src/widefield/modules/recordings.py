"""Maps that were cut off from the trunk, and the way of their gradients back to it."""

import warnings
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed


@dataclass(eq=False)
class _Recorded:
    """The map of an image with the graph of its trunk, and what is known of the gradient of its leaf.

    `arrived`: the leaf has a gradient that was not yet brought to the trunk. `fmap` is None when its graph is used up. `brought` is
    what of the leaf's gradient the trunk has got already, where the graph was retained.
    """

    image: Any
    fmap: Tensor | None
    gradient: Tensor | None = None
    arrived: bool = False
    brought: Tensor | None = None

    def increment(self) -> Tensor:
        """Return the gradient that has to be brought now."""
        assert self.gradient is not None
        return self.gradient if self.brought is None else self.gradient - self.brought


class Recordings:
    """The maps of a module that are cut off from its trunk. Each is kept by its leaf alone, and goes with it.

    Gradients of several maps are brought in one backward pass: a data-parallel trunk adds up the processes once in a step.
    """

    def __init__(self) -> None:
        self._all: list[weakref.ref[_Recorded]] = []
        self._claims: list[tuple[_Recorded, Tensor]] = []
        self._unclaimed = False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy has recorded nothing

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def cut(self, image: Any, fmap: Tensor) -> Tensor:
        """A leaf with the values of `fmap`, the map of `image`."""
        self._warn_of_lost_gradient()
        leaf = fmap.detach().requires_grad_()
        recorded = _Recorded(image, fmap)
        leaf.register_post_accumulate_grad_hook(partial(self._arrive, recorded))
        self._all = [*(one for one in self._all if one() is not None), weakref.ref(recorded)]
        return leaf

    def bring(self, retain_graph: bool) -> None:
        """Bring the gradients of all leaves that a backward pass has reached.

        Raises:
            RuntimeError: A second one has reached a leaf whose graph was not retained in the first.
        """
        arrived = [one for one in self._alive() if one.arrived]
        if any(one.fmap is None for one in arrived):
            raise RuntimeError(
                "a second loss was derived from a map of forward_streaming, whose trunk is gone after the first: call backward on "
                "the sum of the losses, or with retain_graph=True on all but the last"
            )
        self._run([(one, one.increment()) for one in arrived], retain_graph)

    def bring_one(self, image: Any, gradient: Tensor) -> bool:
        """Bring `gradient`, of a map of `image`; False if nothing is recorded of it.

        Nothing is done if that very gradient was brought before. With several processes it waits until the gradients of all
        leaves that the backward pass has reached were given.
        """
        self._unclaimed = False
        of_image = [one for one in self._alive() if one.image is image]
        same = [one for one in of_image if one.gradient is gradient]
        if same and not same[0].arrived:
            return True
        claimed = {id(one) for one, _ in self._claims}
        recorded = next((one for one in same or of_image if one.fmap is not None and id(one) not in claimed), None)
        if recorded is None:
            return False
        self._claims.append((recorded, gradient))
        claimed.add(id(recorded))
        if _several_processes() and any(one.arrived and id(one) not in claimed for one in self._alive()):
            return True
        claims, self._claims = self._claims, []
        self._run(claims, retain_graph=False)
        return True

    def _run(self, gradients: list[tuple[_Recorded, Tensor]], retain_graph: bool) -> None:
        self._unclaimed = False
        if not gradients:
            return
        maps = [one.fmap for one, _ in gradients if one.fmap is not None]
        torch.autograd.backward(maps, [gradient for _, gradient in gradients], retain_graph=retain_graph)
        for one, _ in gradients:
            one.arrived = False
            if retain_graph and one.gradient is not None:
                one.brought = one.gradient.clone()
            else:
                one.fmap = None

    def _arrive(self, recorded: _Recorded, leaf: Tensor) -> None:
        recorded.gradient, recorded.arrived = leaf.grad, True
        self._unclaimed = True

    def _alive(self) -> list[_Recorded]:
        return [recorded for one in self._all if (recorded := one()) is not None]

    def _warn_of_lost_gradient(self) -> None:
        """Say that the gradient of an earlier map went no further, as when `backward` was overridden and leaves the trunk out."""
        if self._unclaimed or self._claims:
            warnings.warn(
                "the last loss gave a gradient to a map of forward_streaming, and nothing brought it to the trunk, which does not "
                "train so: in backward call self.backward_streaming(image, map.grad) for every map, or super().backward(loss); "
                "with manual optimisation self.manual_backward(loss); or freeze the trunk with train_streaming_layers=False",
                stacklevel=4,
            )
        self._unclaimed, self._claims = False, []


def _several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
