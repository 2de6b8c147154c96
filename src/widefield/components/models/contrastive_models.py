"""Contrastive learning: SimCLR and MoCo, and the steps that they share with the methods of `widefield.pretraining`."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from lightly.models.utils import batch_shuffle, batch_unshuffle
from lightly.utils.dist import world_size
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.nn import functional

from widefield.components.data_sample import DataSample
from widefield.components.losses.embedding_losses import joint
from widefield.components.models.base_model import BaseSelfSupervisor
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS


def momentum_copy(module: nn.Module) -> Any:
    """Return a copy that no gradient trains, but `follow`."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(pairs: Sequence[tuple[nn.Module, nn.Module]], momentum: float) -> None:
    """Move the second of every pair towards the first: copy = momentum * copy + (1 - momentum) * module.

    Unlike `lightly.models.utils.update_momentum` it leaves a weight that is equal in both exactly as it is.
    """
    for module, moving in pairs:
        torch._foreach_lerp_(list(moving.parameters()), list(module.parameters()), 1.0 - momentum)


def rising(step: int, steps: float, start: float, end: float = 1.0) -> float:
    """Return a momentum, or a weight decay, that goes from `start` to `end` in `steps` steps as half a cosine.

    It stays where they are infinitely many.
    """
    return start if math.isinf(steps) else cosine_schedule(min(step, int(steps)), int(steps) + 1, start, end)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Put keys (N, D) in the place of the oldest ones of a queue (size, D); where it ends it begins anew.

    `lightly.models.modules.memory_bank` drops the keys that do not fit in front of its end.

    Args:
        queue: Changed in place.
        pointer: The number of the oldest, (1,), changed in place.
        keys: Of more than `size` the last ones are kept.
    """
    count = len(keys)
    places = (pointer + torch.arange(count, device=keys.device)) % len(queue)
    queue[places[-len(queue) :]] = keys[-len(queue) :].to(queue)
    pointer.add_(count).remainder_(len(queue))


def compare_in_batch(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return similarities of two views (N, D) of the images of a batch, over all processes; vectors have the norm 1.

    Returns:
        Those of every view with the other of its image, (2 N, 1), and with the views of the other images, (2 N, 2 N - 2).
    """
    z = torch.cat([joint(first), joint(second)])
    similarity = z @ z.T
    count = len(z)
    itself = torch.eye(count, dtype=torch.bool, device=z.device)
    pair = itself.roll(count // 2, dims=1)
    return similarity[pair][:, None], similarity[~(itself | pair)].view(count, count - 2)


def compare_with_queue(query: Tensor, key: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """Return similarities (N, 1) of queries (N, D) with their keys (N, D), and (N, size) with a queue (D, size), all of norm 1."""
    return (query * key).sum(dim=1, keepdim=True), query @ queue


@MODELS.register_module()
class SimCLR(BaseSelfSupervisor):
    """SimCLR: two views of an image are nearer to each other than to those of all other images in the batch.

    Chen et al., 2020, https://arxiv.org/abs/2002.05709, equation 1. The parts are any backbone, NonLinearNeck and ContrastiveHead,
    which has the temperature. The batch is that of all processes.
    """

    def loss(self, inputs: Sequence[Tensor], data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """Return the loss of two views, in a list, each (N, C, H, W)."""
        self._require("neck", "head")
        projected = self.neck(self.backbone(torch.cat(two_views(inputs))))[0]
        first, second = functional.normalize(projected, dim=1).chunk(2)
        return {"loss": self.head.loss(*compare_in_batch(first, second))}


@MODELS.register_module()
class MoCo(BaseSelfSupervisor):
    """MoCo, v1 and v2: a view of an image is nearer to another view of it than to those in a queue of earlier images.

    He et al., 2019, https://arxiv.org/abs/1911.05722; Chen et al., 2020, https://arxiv.org/abs/2003.04297. The other views go
    through an encoder whose weights follow those of the backbone and the neck. In training, at each call of `loss`, these weights
    move first, and the new keys replace the oldest of the queue last. Several processes share their keys, and each encodes keys of
    images that were shuffled among all of them, so that batch norms do not tell which belong together.

    Attributes:
        encoder_k: Backbone and neck whose weights follow.
        queue: Keys (feat_dim, queue_len) of norm 1.
        queue_ptr: Which of them is the oldest, (1,).

    Args:
        queue_len: Keys in the queue, at least those of one batch of all processes.
        feat_dim: Width of what the neck gives.
        momentum: m of key weights = (1 - m) * key weights + m * query weights; 0.001 is called 0.999 in the paper.
        kwargs: Those of `BaseSelfSupervisor`; the temperature is an argument of the head.
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, queue_len: int = 65536, feat_dim: int = 128, momentum: float = 0.001, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._require("neck", "head")
        if queue_len < 1 or not 0 <= momentum <= 1:
            raise WrongArgumentError(f"queue_len={queue_len} must be positive, and momentum={momentum} from 0 to 1")
        self.queue_len = queue_len
        self.momentum = momentum
        self.encoder_k = momentum_copy(nn.Sequential(self.backbone, self.neck))
        self.register_buffer("queue", functional.normalize(torch.randn(feat_dim, queue_len), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def init_weights(self) -> None:
        """Initialise the weights; the key encoder begins as a copy."""
        super().init_weights()
        self._follow(1.0)

    def loss(self, inputs: Sequence[Tensor], data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """Return the loss of two views, in a list, each (N, C, H, W): queries and keys."""
        of_query, of_key = two_views(inputs)
        query = functional.normalize(self.neck(self.backbone(of_query))[0], dim=1)
        if query.shape[1] != len(self.queue):
            raise WrongArgumentError(
                f"the neck gives {query.shape[1]} channels, and feat_dim={len(self.queue)}; make them equal"
            )
        with torch.no_grad():
            if self.training:
                self._follow(self.momentum)
            key = self._encode_keys(of_key)
        queue = self.queue.clone()  # the backward pass needs it as it is now
        loss = self.head.loss(*compare_with_queue(query, key, queue))
        if self.training:
            keys = joint(key)
            if len(keys) > self.queue_len:
                raise WrongArgumentError(
                    f"a batch has {len(keys)} keys, and the queue {self.queue_len}; make queue_len larger, or the batch smaller"
                )
            enqueue(self.queue.T, self.queue_ptr, keys)
        return {"loss": loss}

    def _follow(self, share: float) -> None:
        """Move the weights of the key encoder to those of backbone and neck."""
        follow([(nn.ModuleList([self.backbone, self.neck]), self.encoder_k)], 1 - share)

    def _encode_keys(self, images: Tensor) -> Tensor:
        """Return keys (N, feat_dim) of images (N, C, H, W)."""
        shuffles = world_size() > 1 and self.training
        if shuffles:
            images, order = batch_shuffle(images, distributed=True)
        keys: Tensor = functional.normalize(self.encoder_k(images)[0], dim=1)
        return batch_unshuffle(keys, order, distributed=True) if shuffles else keys


def two_views(inputs: Any) -> tuple[Tensor, Tensor]:
    """Return the views of a batch, both (N, C, H, W).

    Raises:
        WrongArgumentError: There are not two of them.
    """
    if isinstance(inputs, (list, tuple)) and len(inputs) == 2 and inputs[0].shape[:1] == inputs[1].shape[:1]:
        return inputs[0], inputs[1]
    given = f"a tensor of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else f"{len(inputs)} parts"
    raise WrongArgumentError(
        f"two views of each image are compared, and the inputs are {given}; give a list [view 1, view 2]"
    )
