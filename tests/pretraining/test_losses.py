"""The losses of methods with two views, in double precision, against their formulas written out pair by pair."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.pretraining.tiny import TinyWrapper, small
from widefield.pretraining import METHODS, EmbeddingModel, Run

BATCH, QUEUE = 5, 8


def make(name: str, steps: int = 100, **options: Any) -> Any:
    """A method in double precision, whose moving copies differ from what they follow."""
    torch.manual_seed(0)
    method = METHODS.get(name)(
        EmbeddingModel(TinyWrapper()), Run(12, 100, BATCH, steps), **deepcopy({**small(name), **options})
    ).double()  # the teacher of others stays as it is
    for companion in method.companions:
        companion.double()
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * parameter.abs().mean() * torch.randn_like(parameter))
    return method


def views(*sides: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.rand(BATCH, 3, side, side, dtype=torch.float64) for side in sides]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def cross_entropy(right: Tensor, others: list[Tensor], temperature: float) -> Tensor:
    """-log of the share that exp(right / temperature) has."""
    return torch.stack([right, *others]).div(temperature).logsumexp(0) - right / temperature


def assert_equal(loss: Any, wanted: Any) -> None:
    # queues begin with vectors that have length 1 in single precision, and DINO's temperature has that, too
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-12)


def test_simclr_finds_the_partner_among_all_other_views() -> None:
    method, (one, two) = make("simclr", temperature=0.3), views(16, 16)
    z = method.head(method.embedding.vectors(torch.cat([one, two])))
    total = torch.zeros((), dtype=torch.float64)
    for k in range(2 * BATCH):
        partner = (k + BATCH) % (2 * BATCH)
        others = [cosine(z[k], z[n]) for n in range(2 * BATCH) if n not in (k, partner)]
        total = total + cross_entropy(cosine(z[k], z[partner]), others, 0.3)
    assert_equal(method.loss([one, two], 0)["loss"], total / (2 * BATCH))


def test_moco_finds_the_key_of_the_moving_copy_before_it_is_in_the_queue() -> None:
    method, (one, two) = make("moco", temperature=0.3, queue_size=QUEUE), views(16, 16)
    queue = method.criterion.memory_bank.bank.clone()
    query = method.head(method.embedding.vectors(one))
    key = method.key_head(method.key_embedding.vectors(two))
    parts = [
        cross_entropy(cosine(query[k], key[k]), [cosine(query[k], old) for old in queue], 0.3) for k in range(BATCH)
    ]
    assert_equal(method.loss([one, two], 0)["loss"], torch.stack(parts).mean())
    assert_equal(method.criterion.memory_bank.bank[:BATCH], F.normalize(key.detach()))
    assert torch.equal(method.criterion.memory_bank.bank[BATCH:], queue[BATCH:])


def test_byol_is_the_cosine_of_each_prediction_with_the_copys_projection_of_the_other_view() -> None:
    method, (one, two) = make("byol"), views(16, 16)
    total = torch.zeros((), dtype=torch.float64)
    for seen, other in ((one, two), (two, one)):
        predicted = method.prediction(method.projection(method.embedding.vectors(seen)))
        target = method.target_projection(method.target_embedding.vectors(other))
        total = total - sum(cosine(p, t) for p, t in zip(predicted, target, strict=True)) / BATCH
    loss = method.loss([one, two], 0)["loss"]
    assert_equal(loss, total)
    loss.backward()
    for module, trains in (
        (method.embedding, True),
        (method.prediction, True),
        (method.target_embedding, False),
        (method.target_projection, False),
    ):
        assert any(p.grad is not None and bool(p.grad.any()) for p in module.parameters()) == trains


def test_barlow_twins_makes_the_cross_correlation_the_identity() -> None:
    method, (one, two) = make("barlowtwins", lambda_param=0.2), views(16, 16)
    a, b = (method.head(method.embedding.vectors(view)) for view in (one, two))
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (a, b))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(a.shape[1]):
        for j in range(a.shape[1]):
            correlation = (a[:, i] * b[:, j]).mean()
            total = total + ((1 - correlation) ** 2 if i == j else 0.2 * correlation**2)
    assert_equal(method.loss([one, two], 0)["loss"], total)


def test_vicreg_is_invariance_variance_and_covariance() -> None:
    method, (one, two) = make("vicreg", lambda_param=3.0, mu_param=5.0, nu_param=7.0), views(16, 16)
    pair = [method.head(method.embedding.vectors(view)) for view in (one, two)]
    total = 3.0 * (pair[0] - pair[1]).square().mean()
    for z in pair:
        count, dim = z.shape
        centred = z - z.mean(0)
        for i in range(dim):
            spread = (centred[:, i].square().sum() / (count - 1) + 1e-4).sqrt()
            total = total + 5.0 * 0.5 * (1 - spread).clamp(min=0) / dim
            for j in set(range(dim)) - {i}:
                covariance = (centred[:, i] * centred[:, j]).sum() / (count - 1)
                total = total + 7.0 * covariance**2 / dim
    assert_equal(method.loss([one, two], 0)["loss"], total)


def test_dino_is_the_cross_entropy_of_the_teachers_global_views_with_all_other_views() -> None:
    method, seen = make("dino", steps=1000, batch_norm=True, teacher_temp=0.07), views(16, 16, 8)
    center = method.criterion.center.uniform_(-0.1, 0.1).clone()[0, 0]
    step, temperature = 20, 0.04 + 0.03 * 20 / 300
    whole = torch.cat(seen[:2])
    teachers = method.teacher_head(method.teacher_embedding.vectors(whole)).chunk(2)
    students = [
        *method.head(method.embedding.vectors(whole)).chunk(2),
        method.head(method.embedding.vectors(seen[2])),
    ]
    parts = []
    for k, teacher in enumerate(teachers):
        for n, student in enumerate(students):
            if k != n:
                wanted = ((teacher - center) / temperature).softmax(-1)
                parts.append(-(wanted * (student / 0.1).log_softmax(-1)).sum(-1).mean())
    assert len(parts) == 4
    results = method.loss(seen, step)
    assert results["schedule/teacher_temp"] == pytest.approx(temperature)
    assert_equal(results["loss"], torch.stack(parts).mean())
    mean = torch.cat(list(teachers)).mean(0).detach()
    assert_equal(method.criterion.center[0, 0], 0.9 * center + 0.1 * mean)


def test_densecl_finds_the_most_similar_position_too() -> None:
    options = {"temperature": 0.3, "queue_size": QUEUE, "dense_weight": 0.25}
    method, (one, two) = make("densecl", **options), views(16, 16)
    queue, dense_queue = method.criterion.memory_bank.bank.clone(), method.dense_queue.bank.clone()

    def positions(embedding: EmbeddingModel, view: Tensor) -> tuple[Tensor, Tensor]:
        maps = embedding(view, pool=False)
        return maps.mean((2, 3)), maps.flatten(2).transpose(1, 2)

    pooled, ours = positions(method.embedding, one)
    key_pooled, theirs = positions(method.key_embedding, two)
    count = ours.shape[1]
    query, key = method.head(pooled), method.key_head(key_pooled)
    dense, key_dense = (
        head(maps.flatten(0, 1)).unflatten(0, (BATCH, count))
        for head, maps in ((method.dense_head, ours), (method.key_dense_head, theirs))
    )
    whole, local = [], []
    for k in range(BATCH):
        whole.append(cross_entropy(cosine(query[k], key[k]), [cosine(query[k], old) for old in queue], 0.3))
        for n in range(count):
            partner = int(torch.stack([cosine(ours[k, n], theirs[k, m]) for m in range(count)]).argmax())
            right = cosine(dense[k, n], key_dense[k, partner])
            local.append(cross_entropy(right, [cosine(dense[k, n], old) for old in dense_queue], 0.3))
    wanted = 0.75 * torch.stack(whole).mean() + 0.25 * torch.stack(local).mean()
    assert_equal(method.loss([one, two], 0)["loss"], wanted)


def test_distillation_repeats_the_teachers_similarities() -> None:
    method, (view,) = (
        make("distillation", temperature_global=0.3, temperature_local=0.2, queue_size=QUEUE, loss_local_weight=0.5),
        views(16),
    )
    queue, teacher = method.queue.bank.clone(), method.companions[0]
    torch.manual_seed(2)
    loss = method.loss([view], 0)["loss"]
    torch.manual_seed(2)
    share = torch.rand(())
    images = share * view + (1 - share) * view[torch.randperm(BATCH)]
    maps, wanted_maps = method.embedding(images, pool=False), teacher.forward_features(images)["features"]
    wanted = wanted_maps.mean((2, 3))
    student = method.head(maps.mean((2, 3)))

    def divergence(ours: list[Tensor], theirs: list[Tensor], temperature: float) -> Tensor:
        p, q = (torch.stack(x).div(temperature).softmax(0) for x in (theirs, ours))
        return (p * (p / q).log()).sum()

    others = [*wanted, *queue]
    whole = [
        divergence([cosine(student[k], o) for o in others], [cosine(wanted[k], o) for o in others], 0.3)
        for k in range(BATCH)
    ]
    ours, theirs = (x.flatten(2).transpose(1, 2) for x in (maps, wanted_maps))
    ours = method.local_head(ours)
    local = [
        divergence([cosine(x[n], y) for y in x], [cosine(t[n], y) for y in t], 0.2)
        for x, t in zip(ours, theirs, strict=True)
        for n in range(x.shape[0])
    ]
    assert_equal(loss, torch.stack(whole).mean() + 0.5 * torch.stack(local).mean())


def test_moving_copies_follow_each_their_own_module() -> None:
    for name, pairs in {
        "byol": (("embedding", "target_embedding"), ("projection", "target_projection")),
        "moco": (("embedding", "key_embedding"), ("head", "key_head")),
        "dino": (("embedding", "teacher_embedding"), ("head", "teacher_head")),
    }.items():
        method: nn.Module = make(name, **{"dino": {"momentum_start": 0.9}}.get(name, {"momentum": 0.9}))
        before = {copy: [p.clone() for p in method.get_submodule(copy).parameters()] for _, copy in pairs}
        method.before_step(0)  # type: ignore[operator]
        for module, copy in pairs:
            now, then = list(method.get_submodule(copy).parameters()), before[copy]
            for moved, old, followed in zip(now, then, method.get_submodule(module).parameters(), strict=True):
                assert_equal(moved, 0.9 * old + 0.1 * followed.detach())
            assert any(not torch.equal(moved, old) for moved, old in zip(now, then, strict=True))
