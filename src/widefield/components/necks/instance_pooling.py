"""Multiple-instance learning: from a map of instances, the patches of a slide say, to logits of all of them together.

An instance is a position of the map. Each module takes a map and maybe a mask of the instances that count, and shows on request how
much each of them counted. In a configuration they are necks, before a head without parameters (`ClsHead`).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from widefield.components.necks.projection_necks import last_features
from widefield.errors import WrongArgumentError
from widefield.registry import MODELS

LossFunction = Callable[[Tensor, Tensor], Tensor]


class InstancePooling(nn.Module):
    """Base of modules that pool the instances of a map to logits. A subclass writes `forward`.

    Args:
        in_channels: Channels D of the map.
        num_classes: Logits C.
    """

    component_kind = "neck"

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 1:
            raise WrongArgumentError(f"in_channels={in_channels}, num_classes={num_classes}: both must be positive")
        self.in_channels = in_channels
        self.num_classes = num_classes

    def forward(self, x: Tensor, mask: Tensor | None = None, return_attention: bool = False) -> Any:
        """Return logits (N, C) of maps x (N, D, h, w); with `return_attention` also attention maps (N, K, h, w).

        Args:
            x: The maps; of a tuple, as backbones give it, the last.
            mask: bool (N, h, w), True for the instances that count; None for all. Each of the maps has one at least.
            return_attention: Return (logits, attention): how much each instance counts, 0 where the mask is False.

        Raises:
            WrongArgumentError: Another shape or type of the map or the mask, or a map without an instance.
        """
        raise NotImplementedError

    def loss(
        self, x: Tensor, target: Tensor, loss_fn: LossFunction, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits (N, C), and the loss to train by: `loss_fn(logits, target)`, and what else the head's paper adds."""
        logits = self(x, mask)
        return logits, loss_fn(logits, target)

    def _map(self, inputs: Tensor | Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """Return the map among the inputs.

        Raises:
            WrongArgumentError: See `forward`.
        """
        x = last_features(inputs)
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise WrongArgumentError(
                f"{type(self).__name__} got a map of shape {tuple(x.shape)}, expected (N, {self.in_channels}, h, w)"
            )
        if mask is None:
            return x
        if mask.dtype != torch.bool or mask.shape != (len(x), *x.shape[2:]):
            raise WrongArgumentError(
                f"mask has the shape {tuple(mask.shape)} and type {mask.dtype}, expected bool {(len(x), *x.shape[2:])}"
            )
        if not mask.flatten(1).any(1).all():
            raise WrongArgumentError("the mask of a map is False everywhere, so that it has no instance; leave it out")
        return x


def attend(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Return the softmax over the positions of scores (N, K, h, w), 0 where the mask (N, h, w) is False."""
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
    return scores.flatten(2).softmax(-1).unflatten(2, scores.shape[2:])


def weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """Return the sums (N, K, D) over the positions of x (N, D, h, w), weighted by (N, K, h, w)."""
    return torch.einsum("nkp,ndp->nkd", weights.flatten(2), x.flatten(2))


@MODELS.register_module()
class MeanPooling(InstancePooling):
    """Logits of the mean instance, which are the mean of the logits of all instances.

    logits = W mean_i(x_i) + b. The attention map (N, 1, h, w) is 1 / n everywhere. Arguments are those of `InstancePooling`.

    Examples:
        >>> MeanPooling(8, 2)(torch.rand(1, 8, 5, 7)).shape
        torch.Size([1, 2])
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_attention: bool = False) -> Any:
        x = self._map(x, mask)
        if mask is None:
            mean = x.mean((2, 3))
        else:
            mean = x.masked_fill(~mask[:, None], 0).sum((2, 3)) / mask.sum((1, 2), dtype=x.dtype)[:, None]
        logits = self.classifier(mean)
        return (logits, attend(torch.zeros_like(x[:, :1]), mask)) if return_attention else logits


@MODELS.register_module()
class MaxPooling(InstancePooling):
    """The greatest logit of all instances, for each class.

    logits_c = max_i (W x_i + b)_c. The attention maps (N, C, h, w) are 1 at that instance, the first of several, and 0 elsewhere.
    Arguments are those of `InstancePooling`.

    Examples:
        >>> MaxPooling(8, 2)(torch.rand(1, 8, 5, 7)).shape
        torch.Size([1, 2])
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
        self.classifier = nn.Conv2d(in_channels, num_classes, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_attention: bool = False) -> Any:
        x = self._map(x, mask)
        scores = self.classifier(x)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        logits = scores.amax((2, 3))
        return (logits, _at(scores.flatten(2).argmax(-1), scores)) if return_attention else logits


def _at(indices: Tensor, maps: Tensor) -> Tensor:
    """Return maps of that shape and type with 1 at the indices (N, K) of flattened positions, and 0 elsewhere."""
    return torch.zeros_like(maps).flatten(2).scatter(2, indices[..., None], 1).view_as(maps)


class GatedAttention(nn.Sequential):
    """Scores (N, K, h, w) of maps (N, D, h, w): W (tanh(V x_i) * sigmoid(U x_i)).

    V and U have biases. W has none: a softmax over the instances would take it out again.

    Args:
        in_channels: Channels D.
        hidden_channels: Rows of V and U.
        heads: Scores K of an instance.
        dropout: Of both factors.
    """

    def __init__(self, in_channels: int, hidden_channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.value = nn.Conv2d(in_channels, hidden_channels, 1)
        self.gate = nn.Conv2d(in_channels, hidden_channels, 1)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Conv2d(hidden_channels, heads, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        return self.score(self.dropout(self.value(x).tanh()) * self.dropout(self.gate(x).sigmoid()))


@MODELS.register_module()
class GatedAttentionPooling(InstancePooling):
    """Attention-based pooling with a gate, known as ABMIL (Ilse et al., 2018, https://arxiv.org/abs/1802.04712).

    a = softmax_i(w (tanh(V x_i) * sigmoid(U x_i))), z = sum_i a_i x_i, logits = W z + b. With several heads each has a row of w,
    and W takes their z one behind the other. The attention maps (N, heads, h, w) add up to 1.

    Args:
        in_channels: Channels D of the map.
        num_classes: Logits C.
        hidden_channels: Rows of V and U.
        heads: Attention maps.

    Examples:
        >>> head = GatedAttentionPooling(8, 2)
        >>> logits, attention = head(torch.rand(1, 8, 5, 7), return_attention=True)
        >>> logits.shape, attention.shape
        (torch.Size([1, 2]), torch.Size([1, 1, 5, 7]))
    """

    def __init__(self, in_channels: int, num_classes: int, hidden_channels: int = 128, heads: int = 1) -> None:
        super().__init__(in_channels, num_classes)
        self.attention = GatedAttention(in_channels, hidden_channels, heads)
        self.classifier = nn.Linear(heads * in_channels, num_classes)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_attention: bool = False) -> Any:
        x = self._map(x, mask)
        attention = attend(self.attention(x), mask)
        logits = self.classifier(weighted_sum(attention, x).flatten(1))
        return (logits, attention) if return_attention else logits


@MODELS.register_module()
class CLAM(InstancePooling):
    """Clustering-constrained attention (Lu et al., 2021, https://arxiv.org/abs/2004.09666).

    h_i = relu(W1 x_i), and gated attention as in `GatedAttentionPooling` over h, with one branch for all classes or, of several
    branches, one for each: z_c = sum_i a_ci h_i, logits_c = w_c z_c + b_c. The attention maps are (N, 1 or C, h, w).

    `loss` adds the instance loss: a linear classifier for each class says of single instances whether they belong to it. For the
    class of the label, the `instances` of most attention are to be positive and those of least attention negative; with
    `subtyping`, those of most attention are to be negative for every other class. The loss of an instance is the smooth SVM loss
    log(sum_j exp([j != y] + s_j)) - s_y (Berrada et al., 2018). Of fewer than twice as many instances half are taken; of one alone
    none.

    Args:
        in_channels: Channels D of the map.
        num_classes: Logits C.
        branches: "single" or "multi".
        embed_channels: Rows of W1.
        hidden_channels: Of the attention.
        dropout: Behind W1 and in the attention.
        instances: How many positive and negative ones are taken.
        bag_weight: The loss is bag_weight * that of the logits + (1 - bag_weight) * that of instances.
        subtyping: See above; in the loss of instances the mean over the classes is taken then.

    Examples:
        >>> head = CLAM(8, 3, "multi")
        >>> x, target = torch.rand(1, 8, 5, 7), torch.tensor([2])
        >>> logits, loss = head.loss(x, target, nn.functional.cross_entropy)
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        branches: Literal["single", "multi"] = "single",
        embed_channels: int = 512,
        hidden_channels: int = 256,
        dropout: float = 0.25,
        instances: int = 8,
        bag_weight: float = 0.7,
        subtyping: bool = False,
    ) -> None:
        super().__init__(in_channels, num_classes)
        if branches not in ("single", "multi"):
            raise WrongArgumentError(f"branches={branches!r} must be 'single' or 'multi'")
        if instances < 1 or not 0 <= bag_weight <= 1:
            raise WrongArgumentError(f"instances={instances} must be positive, bag_weight={bag_weight} between 0 and 1")
        self.branches, self.instances, self.bag_weight, self.subtyping = branches, instances, bag_weight, subtyping
        self.embedding = nn.Sequential(nn.Conv2d(in_channels, embed_channels, 1), nn.ReLU(), nn.Dropout(dropout))
        heads = num_classes if branches == "multi" else 1
        self.attention = GatedAttention(embed_channels, hidden_channels, heads, dropout)
        self.classifier = nn.Linear(embed_channels, num_classes)
        self.instance_classifiers = nn.Linear(embed_channels, 2 * num_classes)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_attention: bool = False) -> Any:
        x = self._map(x, mask)
        h = self.embedding(x)
        attention = attend(self.attention(h), mask)
        logits = self._logits(h, attention)
        return (logits, attention) if return_attention else logits

    def loss(
        self, x: Tensor, target: Tensor, loss_fn: LossFunction, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits (N, C), and the loss of both, see the class. `target` are class indices (N,).

        Raises:
            WrongArgumentError: The target is something else.
        """
        x = self._map(x, mask)
        if target.is_floating_point() or target.ndim != 1:
            raise WrongArgumentError(
                f"the instance loss of CLAM needs one class for each image, got targets of shape {tuple(target.shape)} and type "
                f"{target.dtype}; take another head, or bag_weight=1 and forward()"
            )
        h = self.embedding(x)
        scores = self.attention(h)
        logits = self._logits(h, attend(scores, mask))
        each = [
            self._instance_loss(h[n].flatten(1).T, scores[n].flatten(1), int(label), None if mask is None else mask[n])
            for n, label in enumerate(target.tolist())
        ]
        loss = self.bag_weight * loss_fn(logits, target) + (1 - self.bag_weight) * torch.stack(each).mean()
        return logits, loss

    def _logits(self, h: Tensor, attention: Tensor) -> Tensor:
        z = weighted_sum(attention, h)
        return (z * self.classifier.weight).sum(-1) + self.classifier.bias

    def _instance_loss(self, h: Tensor, scores: Tensor, label: int, mask: Tensor | None) -> Tensor:
        """Return that of one map: of instances h (n, E) and scores (1 or C, n) of their attention."""
        if mask is not None:
            h, scores = h[mask.flatten()], scores[:, mask.flatten()]
        count = min(self.instances, len(h) // 2)
        if not count:
            return h.sum() * 0
        scores = scores.detach().expand(self.num_classes, -1)
        most, least = scores.topk(count).indices, scores.topk(count, largest=False).indices
        total = self._smooth_svm(h[most[label]], label, 1) + self._smooth_svm(h[least[label]], label, 0)
        total = total / 2  # the mean over positive and negative instances
        if not self.subtyping:
            return total
        for other in range(self.num_classes):
            if other != label:
                total = total + self._smooth_svm(h[most[other]], other, 0)
        return total / self.num_classes

    def _smooth_svm(self, h: Tensor, which: int, y: int) -> Tensor:
        scores = self.instance_classifiers(h).unflatten(1, (self.num_classes, 2))[:, which]
        margin = torch.ones_like(scores)
        margin[:, y] = 0
        return ((scores + margin).logsumexp(1) - scores[:, y]).mean()


@MODELS.register_module()
class DSMIL(InstancePooling):
    """Dual-stream pooling around the instance of the highest score (Li et al., 2021, https://arxiv.org/abs/2011.08939).

    The first stream is the score of instances, s_i = W0 x_i + b0, and of each class the instance m(c) of the greatest. In the
    second, with q_i = Wq x_i and v_i = Wv x_i, attention of all instances to that one, a_ci = softmax_i(q_i . q_m(c) / sqrt(length
    of q)), as in the authors' code, gives vectors z_c = sum_i a_ci v_i, and Wb takes those of all classes to scores b_c. The logits
    are (s_m(c),c + b_c) / 2, and the loss is the mean of those of s_m and of b. The attention maps are (N, C, h, w). Of several
    greatest instances, of all positions, the first counts; looking it up does not stream: `widefield.stream` runs it on the whole
    map.

    Args:
        in_channels: Channels D of the map.
        num_classes: Logits C.
        query_channels: Length of q.

    Examples:
        >>> DSMIL(8, 2)(torch.rand(1, 8, 5, 7)).shape
        torch.Size([1, 2])
    """

    def __init__(self, in_channels: int, num_classes: int, query_channels: int = 128) -> None:
        super().__init__(in_channels, num_classes)
        self.instance_classifier = nn.Conv2d(in_channels, num_classes, 1)
        self.query = nn.Linear(in_channels, query_channels)
        self.value = nn.Conv2d(in_channels, in_channels, 1)
        self.classifier = nn.Linear(num_classes * in_channels, num_classes)

    def forward(self, x: Tensor, mask: Tensor | None = None, return_attention: bool = False) -> Any:
        best, bag, attention = self._streams(x, mask)
        logits = (best + bag) / 2
        return (logits, attention) if return_attention else logits

    def loss(
        self, x: Tensor, target: Tensor, loss_fn: LossFunction, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return logits (N, C), and the mean of the losses of both streams."""
        best, bag, _ = self._streams(x, mask)
        return (best + bag) / 2, (loss_fn(best, target) + loss_fn(bag, target)) / 2

    def _streams(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the scores (N, C) of both streams, and the attention maps."""
        x = self._map(x, mask)
        scores = self.instance_classifier(x)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        best, index = scores.flatten(2).max(-1)
        instances = x.flatten(2).transpose(1, 2)
        queries = self.query(instances)
        of_best = queries.gather(1, index[..., None].expand(-1, -1, queries.shape[2]))
        likeness = of_best @ queries.transpose(1, 2) / queries.shape[2] ** 0.5
        attention = attend(likeness.unflatten(2, x.shape[2:]), mask)
        z = weighted_sum(attention, self.value(x))
        return best, self.classifier(z.flatten(1)), attention
