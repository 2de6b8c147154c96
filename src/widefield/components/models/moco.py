"""MoCo."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional

from widefield.components.data_sample import DataSample
from widefield.components.errors import WrongArgumentError
from widefield.components.models.base_self_supervisor import BaseSelfSupervisor, two_views
from widefield.components.models.gather import gather, world_size
from widefield.registry import MODELS


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
        self.encoder_k = copy.deepcopy(nn.Sequential(self.backbone, self.neck)).requires_grad_(False)
        self.register_buffer("queue", functional.normalize(torch.randn(feat_dim, queue_len), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def init_weights(self) -> None:
        """Initialise the weights; the key encoder begins as a copy."""
        super().init_weights()
        self._follow(1.0)

    def loss(self, inputs: Sequence[Tensor], data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """The loss of two views, in a list, each (N, C, H, W): queries and keys."""
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
        positive = (query * key).sum(dim=1, keepdim=True)
        negative = query @ self.queue.clone()  # the backward pass needs it as it is now
        loss = self.head.loss(positive, negative)
        if self.training:
            self._enqueue(gather(key))
        return {"loss": loss}

    @torch.no_grad()
    def _follow(self, momentum: float) -> None:
        """Move the weights of the key encoder to those of backbone and neck."""
        for mine, other in zip(self.encoder_k.parameters(), self._query_parameters(), strict=True):
            mine.lerp_(other.to(mine), momentum)

    def _query_parameters(self) -> list[nn.Parameter]:
        return [*self.backbone.parameters(), *self.neck.parameters()]

    def _encode_keys(self, images: Tensor) -> Tensor:
        """Keys (N, feat_dim) of images (N, C, H, W)."""
        if world_size() == 1 or not self.training:
            keys: Tensor = functional.normalize(self.encoder_k(images)[0], dim=1)
            return keys
        order = torch.randperm(len(images) * world_size(), device=images.device)
        dist.broadcast(order, 0)
        rank = dist.get_rank()
        mine = gather(images)[order.chunk(world_size())[rank]]
        shuffled = gather(functional.normalize(self.encoder_k(mine)[0], dim=1))
        return shuffled[order.argsort()].chunk(world_size())[rank]

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """Put keys (N, feat_dim) in the place of the oldest ones; where the queue ends it begins anew."""
        count = len(keys)
        if count > self.queue_len:
            raise WrongArgumentError(
                f"a batch has {count} keys, and the queue {self.queue_len}; make queue_len larger, or the batch smaller"
            )
        places = (self.queue_ptr + torch.arange(count, device=keys.device)) % self.queue_len
        self.queue[:, places] = keys.T.to(self.queue)
        self.queue_ptr.add_(count).remainder_(self.queue_len)
