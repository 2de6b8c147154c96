"""Multiple-instance pooling, against formulas written instance by instance, masked and streamed."""

import math
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.streaming.exactness import assert_exact, relative_error
from widefield.components.models.image_classifier import ImageClassifier
from widefield.components.necks.instance_attention import ABMILX, NystromAttention, TransMIL, pseudo_inverse
from widefield.components.necks.instance_pooling import (
    CLAM,
    DSMIL,
    GatedAttentionPooling,
    InstancePooling,
    MaxPooling,
    MeanPooling,
)
from widefield.errors import WrongArgumentError
from widefield.images import Background, Mask
from widefield.models.patch_encoder import PatchEncoder
from widefield.streaming import StreamingCNN, UnsupportedOpError, stream

D, C, H, W = 6, 3, 4, 5
MAKERS: dict[str, Callable[[], InstancePooling]] = {
    "mean": lambda: MeanPooling(D, C),
    "max": lambda: MaxPooling(D, C),
    "gated attention": lambda: GatedAttentionPooling(D, C, 5),
    "gated attention of 2 heads": lambda: GatedAttentionPooling(D, C, 5, heads=2),
    "CLAM of one branch": lambda: CLAM(D, C, "single", 7, 5, dropout=0.0),
    "CLAM of a branch a class": lambda: CLAM(D, C, "multi", 7, 5, dropout=0.0),
    "DSMIL": lambda: DSMIL(D, C, 4),
    "ABMILX": lambda: ABMILX(D, C, 8, heads=2),
    "TransMIL": lambda: TransMIL(D, C, 8, heads=2, landmarks=4),
}
LOCAL = [name for name in MAKERS if name not in ("DSMIL", "ABMILX", "TransMIL")]


def made(name: str) -> InstancePooling:
    torch.manual_seed(0)
    return MAKERS[name]().double()


def maps(count: int = 2) -> Tensor:
    return torch.randn(count, D, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def some(count: int = 2) -> Tensor:
    return torch.rand(count, H, W, generator=torch.Generator().manual_seed(2)) < 0.6


def softmax(scores: list[float]) -> list[float]:
    total = sum(math.exp(score) for score in scores)
    return [math.exp(score) / total for score in scores]


def gated_scores(part: nn.Module, instances: Tensor) -> Tensor:
    """(K, n) of instances (n, D), one after the other."""
    v, u, w = (layer.weight.flatten(1) for layer in (part.value, part.gate, part.score))
    rows = [w @ ((v @ one + part.value.bias).tanh() * (u @ one + part.gate.bias).sigmoid()) for one in instances]
    return torch.stack(rows, 1)


def by_hand(head: InstancePooling, instances: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (C,) and attention (K, n) of instances (n, D)."""
    n = len(instances)
    if isinstance(head, MeanPooling):
        each = torch.stack([head.classifier(one) for one in instances])
        return each.sum(0) / n, torch.full((1, n), 1 / n, dtype=torch.float64)
    if isinstance(head, MaxPooling):
        each = instances @ head.classifier.weight.flatten(1).T + head.classifier.bias
        shares = torch.tensor([[float(i == each[:, c].argmax()) for i in range(n)] for c in range(C)]).double()
        return torch.stack([max(each[:, c]) for c in range(C)]), shares
    if isinstance(head, GatedAttentionPooling):
        shares = torch.tensor(
            [softmax(row.tolist()) for row in gated_scores(head.attention, instances)], dtype=torch.float64
        )
        z = torch.cat([sum(a * one for a, one in zip(row, instances)) for row in shares])
        return head.classifier(z), shares
    if isinstance(head, CLAM):
        first = head.embedding[0]
        h = (instances @ first.weight.flatten(1).T + first.bias).relu()
        shares = torch.tensor([softmax(row.tolist()) for row in gated_scores(head.attention, h)], dtype=torch.float64)
        z = [sum(a * one for a, one in zip(shares[c if len(shares) > 1 else 0], h)) for c in range(C)]
        return torch.stack([z[c] @ head.classifier.weight[c] + head.classifier.bias[c] for c in range(C)]), shares
    if isinstance(head, DSMIL):
        s = instances @ head.instance_classifier.weight.flatten(1).T + head.instance_classifier.bias
        q = head.query(instances)
        v = instances @ head.value.weight.flatten(1).T + head.value.bias
        shares = torch.tensor(
            [softmax((q @ q[s[:, c].argmax()] / q.shape[1] ** 0.5).tolist()) for c in range(C)],
            dtype=torch.float64,
        )
        return (s.amax(0) + head.classifier((shares @ v).flatten())) / 2, shares
    if isinstance(head, ABMILX):
        h = head.embedding(instances).unflatten(1, (head.heads, -1))
        rows, sums = [], []
        for k in range(head.heads):
            s = head.score(h[:, k])[:, 0]
            q, key = head.query_key(head.norm(h[:, k])).chunk(2, 1)
            likeness = (q @ key.T / q.shape[1] ** 0.5).softmax(1)
            rows.append((s + head.value.weight[0, 0] * (likeness @ s)).softmax(0))
            sums.append(rows[-1] @ h[:, k])
        return head.classifier(head.projection(torch.cat(sums))), torch.stack(rows)
    raise NotImplementedError


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "TransMIL"])
def test_logits_and_attention_are_those_of_the_formula(name: str) -> None:
    head, x = made(name), maps()
    for mask in (None, some()):
        logits, attention = head(x, mask, return_attention=True)
        torch.testing.assert_close(head(x, mask), logits, rtol=0, atol=0)
        assert attention.shape[0] == 2
        assert attention.shape[2:] == (H, W)
        for n in range(2):
            kept = torch.ones(H, W, dtype=torch.bool) if mask is None else mask[n]
            expected, shares = by_hand(head, x[n][:, kept].T)
            assert relative_error(logits[n], expected) < 1e-12
            assert relative_error(attention[n][:, kept], shares) < 1e-12
            assert not attention[n][:, ~kept].any()


@pytest.mark.parametrize("name", MAKERS)
def test_instances_outside_of_the_mask_change_nothing(name: str) -> None:
    head, x, mask = made(name), maps(), some()
    other = torch.where(mask[:, None], x, 1e3 * torch.rand_like(x)).requires_grad_()
    logits = head(other, mask)
    torch.testing.assert_close(logits, head(x, mask), rtol=1e-12, atol=1e-12)
    logits.sum().backward()
    assert other.grad is not None
    assert not other.grad.masked_select(~mask[:, None]).any()


SLOW = [pytest.param(name, marks=pytest.mark.slow) if name == "TransMIL" else name for name in MAKERS]


@pytest.mark.parametrize("name", SLOW)  # TransMIL has many operations to trace
def test_it_streams_as_plain_pytorch_with_the_trunk_that_trains(name: str) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, D, 5, 3), nn.GELU(), made(name)).double()
    image = torch.rand(1, 3, 20, 23, dtype=torch.float64)
    if name in LOCAL:
        assert_exact(net, image, [7, (6, 100)])
    else:
        assert_exact(net, image, [7], stream)
        with pytest.raises(UnsupportedOpError):
            StreamingCNN(net, 7)(image)


def test_an_encoder_of_patches_and_a_head_train_together_as_plain_pytorch_has_it() -> None:
    torch.manual_seed(5)
    net = timm.create_model("test_vit", num_classes=0, img_size=32)
    encoder = PatchEncoder(net, size=32, input_size=32)
    model = nn.Sequential(encoder, GatedAttentionPooling(net.num_features, C, 5)).double()
    assert all(parameter.requires_grad for parameter in model.parameters())
    image = torch.rand(1, 3, 100, 170, dtype=torch.float64)
    assert_exact(model, image, [(64, 100)], stream)
    mask = torch.tensor([[True, False, False, True, False], [False] * 5, [False, True, True, False, False]])
    background = functional.adaptive_max_pool2d(mask[None, None].double(), (100, 170)) == 0
    model.zero_grad()
    streamed = StreamingCNN(model, 32, verify=False)(image, mask=mask, fill=0.5)
    streamed[0, 1].backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    expected = model[1](encoder(image.masked_fill(background, 0.5)), mask[None])
    expected[0, 1].backward()
    assert relative_error(streamed.detach(), expected.detach()) < 1e-10
    for one, parameter in zip(found, model.parameters()):
        assert one is not None
        assert parameter.grad is not None
        assert relative_error(one, parameter.grad) < 1e-10


@pytest.mark.parametrize("name", LOCAL)
def test_a_mask_of_the_engine_leaves_instances_out(name: str) -> None:
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, D, 4, 4), made(name)).double()
    image, cells = torch.rand(1, 3, 24, 20, dtype=torch.float64), some(1)[:, :3]
    streamed = StreamingCNN(net, 8, verify=False)
    found = streamed(image, mask=cells[0], fill=0.25)
    trunk, head = net
    background = functional.adaptive_max_pool2d(cells[:, None].double(), (24, 20)) == 0
    mask = functional.adaptive_max_pool2d(cells[:, None].double(), (6, 5))[:, 0] > 0
    expected = head(trunk(image.masked_fill(background, 0.25)), mask)
    assert relative_error(found.detach(), expected.detach()) < 1e-10
    grads = [torch.autograd.grad(one[0, 1], list(net.parameters()), allow_unused=True) for one in (found, expected)]
    for one, other in zip(*grads):
        if other is not None:  # the instance classifiers of CLAM are for its loss
            assert relative_error(one, other) < 1e-10


def test_the_instance_loss_of_clam_is_that_of_its_formula() -> None:
    x, mask, target = maps(), some(), torch.tensor([2, 0])
    for branches in ("single", "multi"):
        for subtyping in (False, True):
            torch.manual_seed(0)
            head = CLAM(D, C, branches, 7, 5, 0.0, instances=3, bag_weight=0.25, subtyping=subtyping).double()
            logits, loss = head.loss(x, target, functional.cross_entropy, mask)
            torch.testing.assert_close(logits, head(x, mask))
            bag = functional.cross_entropy(logits, target)
            each = []
            for n in range(2):
                instances = x[n][:, mask[n]].T
                h = (instances @ head.embedding[0].weight.flatten(1).T + head.embedding[0].bias).relu()
                scores = gated_scores(head.attention, h)
                weights = head.instance_classifiers.weight.unflatten(0, (C, 2))
                biases = head.instance_classifiers.bias.unflatten(0, (C, 2))

                def svm(i: int, c: int, y: int) -> Tensor:
                    s = weights[c] @ h[i] + biases[c]  # noqa: B023
                    return torch.log(torch.exp(s[y]) + torch.exp(1 + s[1 - y])) - s[y]

                terms = []
                for c in range(C):
                    order = scores[c if branches == "multi" else 0].argsort(descending=True).tolist()
                    if c == int(target[n]):
                        terms.append(sum([svm(i, c, 1) for i in order[:3]] + [svm(i, c, 0) for i in order[-3:]]) / 6)
                    elif subtyping:
                        terms.append(sum(svm(i, c, 0) for i in order[:3]) / 3)
                each.append(sum(terms) / (C if subtyping else 1))
            assert relative_error(loss, 0.25 * bag + 0.75 * sum(each) / 2) < 1e-12


def test_the_instance_loss_of_clam_takes_few_instances_and_one_class_each() -> None:
    head = CLAM(D, C, "multi", 7, 5)
    for count, has_loss in ((1, False), (3, True)):
        head.zero_grad()
        _, loss = head.loss(torch.randn(1, D, 1, count), torch.tensor([1]), functional.cross_entropy)
        loss.backward()
        gradient = head.instance_classifiers.weight.grad
        assert (gradient is not None and bool(gradient.any())) is has_loss
    with pytest.raises(WrongArgumentError, match=r"needs one class for each image, got targets of shape \(1, 3\)"):
        head.loss(torch.randn(1, D, 2, 2), torch.rand(1, 3), functional.binary_cross_entropy_with_logits)


def test_dsmil_trains_both_streams_alike() -> None:
    head, x, target = made("DSMIL"), maps(), torch.tensor([2, 0])
    logits, loss = head.loss(x, target, functional.cross_entropy)
    best, bag, _ = head._streams(x, None)
    expected = (functional.cross_entropy(best, target) + functional.cross_entropy(bag, target)) / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits, (best + bag) / 2)


def test_the_pseudo_inverse_of_nystrom_attention_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.softmax(3 * torch.randn(2, 5, 5, dtype=torch.float64, generator=generator), -1)
    torch.testing.assert_close(pseudo_inverse(matrix, 30), torch.linalg.pinv(matrix))


def test_nystrom_attention_with_a_landmark_for_each_token_is_plain_attention() -> None:
    torch.manual_seed(0)
    attention = NystromAttention(8, heads=2, landmarks=50, iterations=40, kernel_size=3).double()
    tokens = torch.randn(2, 7, 8, dtype=torch.float64)
    q, k, v = attention.query_key_value(tokens).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    shares = (q @ k.transpose(2, 3) / 2).softmax(-1)
    residual = functional.conv2d(v, attention.residual.weight, padding=(1, 0), groups=2)
    expected = attention.projection((shares @ v + residual).transpose(1, 2).flatten(2))
    found, looks = attention(tokens)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(looks, shares[:, :, 0])


def test_transmil_is_its_parts_in_the_order_of_the_paper() -> None:
    head, x, mask = made("TransMIL"), maps(1), some(1)
    tokens = head.embedding(x[0][:, mask[0]].T)
    n = len(tokens)
    side = next(k for k in range(99) if k * k >= n)
    tokens = torch.cat([head.class_token[0], tokens, tokens[: side**2 - n]])
    tokens = tokens + head.attentions[0](head.norms[0](tokens)[None])[0][0]
    square = tokens[1:].T.reshape(1, -1, side, side)
    square = square + sum(convolution(square) for convolution in head.positions.convolutions)
    tokens = torch.cat([tokens[:1], square[0].flatten(1).T])
    change, looks = head.attentions[1](head.norms[1](tokens)[None])
    expected = head.classifier(head.norms[2](tokens + change[0])[0])
    logits, attention = head(x, mask, return_attention=True)
    torch.testing.assert_close(logits[0], expected)
    torch.testing.assert_close(attention[0][:, mask[0]], looks[0, :, 1 : n + 1])
    assert not attention[0][:, ~mask[0]].any()


def test_maps_and_masks_that_do_not_fit_are_refused() -> None:
    head = GatedAttentionPooling(D, C)
    for x, mask, message in (
        (torch.rand(1, 4, H, W), None, r"got a map of shape \(1, 4, 4, 5\), expected \(N, 6, h, w\)"),
        (torch.rand(2, D), None, r"got a map of shape \(2, 6\)"),
        (torch.rand(1, D, H, W), torch.ones(H, W, dtype=torch.bool), r"expected bool \(1, 4, 5\)"),
        (torch.rand(1, D, H, W), torch.zeros(1, H, W, dtype=torch.bool), "has no instance"),
    ):
        with pytest.raises(WrongArgumentError, match=message):
            head(x, mask)
    with pytest.raises(WrongArgumentError, match="branches='both'"):
        CLAM(D, C, "both")  # type: ignore[arg-type]
    with pytest.raises(WrongArgumentError, match="no multiple of heads=8"):
        TransMIL(D, C, 12)


@pytest.mark.parametrize("name", ["CLAM of a branch a class", "DSMIL", "TransMIL"])
def test_as_a_neck_it_leaves_the_background_of_an_image_out(name: str) -> None:
    neck, fmap, mask = made(name), maps(1), some(1)
    backbone = {"type": "ResNet_CIFAR", "depth": 18, "base_channels": 4, "stem_channels": 4}
    model = ImageClassifier(backbone, neck, {"type": "ClsHead"})
    background = Background(Mask(mask[0].numpy()), (0.0,), required=True)
    torch.testing.assert_close(model.neck_features((fmap,), background), neck(fmap, mask))
    torch.testing.assert_close(model.neck_features((fmap,), None), neck(fmap))
