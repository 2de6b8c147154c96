"""Distillation."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from widefield.components.losses.embedding_losses import joint
from widefield.models import load_weights
from widefield.models.instances import PATCHES_PREFIX, is_patches, network_of
from widefield.models.patch_encoder import PatchEncoder
from widefield.pretraining.embedding import EmbeddingModel
from widefield.pretraining.methods import METHODS
from widefield.pretraining.methods.base import Auto, Count, Method, Queue, Run, Temperature, Weight, queue_length
from widefield.pretraining.optimizers import LARS, SGD, AdamW, Optim, OptimArgs
from widefield.pretraining.transform_args import ColorJitter, GaussianBlur, Normalize, RandomResize, TransformArgs
from widefield.pretraining.wrapping import THEIRS, has_batch_norm, wrap


@METHODS.register_module("distillation")
class Distillation(Method):
    """Learns to see images as a teacher does: which other images are alike, and which positions of an image are.

    The teacher sees images normalised as the configuration of its weights says, if it is of timm, else as the student does. A
    teacher of patches, `patches:timm/NAME`, sees those of an image one by one, and gives a map of them: so a convolutional student
    learns, from views of several patches each, what it can then say of whole slides, streamed.

    The loss is KL(teacher || student) of softmax(similarities / temperature), of a pooled embedding with those of a queue and of
    the batch, plus `loss_local_weight` times the same of every position of a map with all others of that map. The student's
    features go through a linear layer each, its map is resized to the teacher's. Images are mixed in pairs, by a share
    that is drawn anew for every batch (Zhang et al., mixup, https://arxiv.org/abs/1710.09412).

    Args:
        embedding, run: See `Method`.
        teacher: A wrapper, a model of torchvision or timm, or the name of one; see `widefield.pretraining.wrap`. Or
            `patches:timm/NAME`.
        teacher_args: Arguments of its constructor, if `teacher` is a name: `{"pretrained": True}` downloads weights of timm. Of
            patches those of `PatchEncoder`: `{"size": 224}` are the pixels of a patch, `{"weights": "DEFAULT"}` downloads weights.
        teacher_weights: A file with its weights.
        temperature_global, temperature_local: Of the similarities of images, and of positions.
        loss_local_weight: Of the loss of positions.
        queue_size: Images that are remembered; "auto": a power of two of at most half the images, at most 8192.

    Raises:
        ValueError: The teacher is unknown, or has random weights.
    """

    transforms = TransformArgs(
        random_resize=RandomResize(0.14, 1.0),
        color_jitter=ColorJitter(0.8, 0.5, 0.8, 0.8, 0.4, 0.2),
        gaussian_blur=GaussianBlur(1.0, (0.0, 0.1)),
        num_views=1,
    )
    optim = Optim(
        (AdamW(5e-4, weight_decay=0.04), SGD(0.1, 0.9, 1e-4), LARS(1.8, 0.9, 1e-6)),
        1536,
        lr_scale_method="sqrt",
        gradient_clip_val=1.0,
    )
    takes_local_views = False
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        embedding: EmbeddingModel,
        run: Run,
        teacher: Any,
        teacher_args: dict[str, Any] | None = None,
        teacher_weights: str | Path | None = None,
        temperature_global: Temperature = 0.07,
        temperature_local: Temperature = 0.07,
        loss_local_weight: Weight = 1.0,
        queue_size: Count | Auto = "auto",
    ) -> None:
        super().__init__(embedding, run)
        named = isinstance(teacher, str) and teacher.partition("/")[0] not in THEIRS  # of those `wrap` says more
        if named and not teacher_args and teacher_weights is None:
            raise ValueError(
                f"the teacher {teacher} would have random weights; give a file as teacher_weights, or arguments as teacher_args"
            )
        of_patches = isinstance(teacher, str) and is_patches(teacher)
        if of_patches:
            wrapper: Any = PatchTeacher(teacher, {"weights": teacher_weights, **(teacher_args or {})})
        else:
            wrapper = wrap(teacher, teacher_args, len(run.normalize.mean))
        if not {*map(id, wrapper.parameters())}.isdisjoint(map(id, embedding.parameters())):
            wrapper = copy.deepcopy(wrapper)  # frozen below, and the student shall train
        if teacher_weights is not None and not of_patches:
            load_weights(wrapper.get_model(), teacher_weights)
        dim: int = wrapper.feature_dim()
        config = getattr(wrapper.get_model(), "pretrained_cfg", None) or {}
        scale, shift = _renormalisation(run.normalize, _UNIT if of_patches else config)
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.companions = (wrapper.eval().requires_grad_(False),)
        self.temperatures, self.local_weight = (temperature_global, temperature_local), loss_local_weight
        self.head, self.local_head = nn.Linear(run.embedding_dim, dim), nn.Linear(embedding.channels, dim)
        for layer in (self.head, self.local_head):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.queue = Queue(queue_length(queue_size, run.dataset_size, 8192), dim)

    @classmethod
    def optim_for(cls, optim: OptimArgs, wrapper: Any) -> OptimArgs:
        """Return `optim`, for a convolutional network with batch norm with almost no weight decay, as its weights have no scale."""
        return replace(optim, weight_decay=1e-6) if isinstance(optim, AdamW) and has_batch_norm(wrapper) else optim

    def loss(self, views: Sequence[Tensor], step: int) -> dict[str, Tensor | float]:
        images = torch.cat([_mixed(view) for view in views])
        wrapper: Any = self.companions[0]
        with torch.no_grad():
            seen = wrapper.forward_features(images * self.scale + self.shift)
            wanted = wrapper.forward_pool(seen)["pooled_features"].flatten(1)
            wanted_map = seen["features"]
        features = self.embedding.features(images)
        whole = self._whole(self.head(self.embedding.pooled(features).flatten(1)), wanted)
        maps = F.interpolate(self.embedding.maps(features), wanted_map.shape[2:], mode="bilinear")
        local = self._local(self.local_head(maps.flatten(2).transpose(1, 2)), wanted_map.flatten(2).transpose(1, 2))
        return {
            "loss": whole + self.local_weight * local,
            "train_loss/global": whole.detach(),
            "train_loss/local": local.detach(),
        }

    def _whole(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of embeddings (B, D)."""
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        _, remembered = self.queue(teacher, update=student.requires_grad)
        others = torch.cat([joint(teacher).T, remembered], dim=1)
        return _divergence(student @ others, teacher @ others, self.temperatures[0])

    def _local(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of positions (B, N, D)."""
        student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        ours, theirs = (x @ x.transpose(1, 2) for x in (student, teacher))
        return _divergence(ours.flatten(0, 1), theirs.flatten(0, 1), self.temperatures[1])


_UNIT = {"mean": (0.0,), "std": (1.0,)}
"""For images with values from 0 to 1, which an encoder of patches normalises itself."""


class PatchTeacher(nn.Module):
    """A wrapper of an encoder that sees the patches of an image one by one, on a grid from its upper left corner.

    Args:
        name: `patches:timm/NAME`.
        arguments: Those of `PatchEncoder`.

    Raises:
        ValueError: There are no weights, or no such network or arguments.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        if arguments.get("weights") is None:
            raise ValueError(
                f"the teacher {name} would have random weights; give a file as teacher_weights, or weights=DEFAULT in teacher_args"
            )
        try:
            self.encoder = PatchEncoder(name.removeprefix(PATCHES_PREFIX), **arguments)
        except TypeError as error:
            raise ValueError(f"teacher_args: {error}") from error

    def get_model(self) -> nn.Module:
        """Return the network."""
        found: nn.Module = network_of(self.encoder)
        return found

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """Return the map (N, D, rows, columns) of images from 0 to 1."""
        return {"features": self.encoder(x)}

    def forward_pool(self, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean of all patches (N, D, 1, 1)."""
        return {"pooled_features": x["features"].mean((2, 3), keepdim=True)}

    def feature_dim(self) -> int:
        """Return D."""
        return int(network_of(self.encoder).num_features)


def _renormalisation(student: Normalize, teacher: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return factors and summands (C, 1, 1) that make of images normalised for the student such as the teacher was trained on."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (student.mean, student.std))
    wanted = [torch.tensor(teacher.get(name) or ours) for name, ours in (("mean", student.mean), ("std", student.std))]
    mean_there, std_there = (values[torch.arange(len(mean)) % len(values)].view(-1, 1, 1) for values in wanted)
    return std / std_there, (mean - mean_there) / std_there


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    ours, theirs = ((x / temperature).log_softmax(-1) for x in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _mixed(images: Tensor) -> Tensor:
    share = torch.rand((), device=images.device)
    return share * images + (1 - share) * images[torch.randperm(len(images), device=images.device)]
