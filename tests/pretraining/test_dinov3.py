"""DINOv3: Gram anchoring, its teacher, constant schedules, and transformers with rotary positions."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from tests.pretraining.tiny import checkpoint, exported, losses, small, train, write_images
from tests.pretraining.tiny_vit import check_a_run, images, make, own_vit
from widefield.pretraining import METHODS, wrap
from widefield.pretraining.methods.dinov3 import gram_loss
from widefield.pretraining.methods.transformers import EvaTransformer

DINOV3 = small("dinov3")
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}


def rotary_vit(name: str = "vit_small_patch16_dinov3", **options: Any) -> nn.Module:
    """Patches of 4 pixels; a class token, 4 registers and the rotary positions of DINOv3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name, **{**SIZES, "dynamic_img_size": True, **options})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def test_a_run_repeats_goes_on_at_the_step_and_exports(tmp_path: Path, data: Path) -> None:
    """The Gram teacher is the teacher of step 2, and the broken run goes on at step 3."""
    check_a_run("dinov3", rotary_vit, tmp_path, data, method_args={**DINOV3, "gram_start_step": 1, "gram_updates": 1})
    state = checkpoint(tmp_path / "broken")["state_dict"]
    teachers = {kind: state[f"method.{kind}_embedding.wrapped_model._model.cls_token"] for kind in ("gram", "teacher")}
    assert not torch.equal(teachers["gram"], teachers["teacher"])
    assert torch.equal(exported(tmp_path / "broken")["cls_token"], teachers["teacher"])
    assert exported(tmp_path / "broken").keys() == rotary_vit().state_dict().keys()


def test_a_model_is_taken_by_its_name_and_what_does_not_suit_is_refused(tmp_path: Path, data: Path) -> None:
    train(tmp_path / "named", data, "dinov3", model="timm/vit_small_patch16_dinov3", model_args=SIZES)
    assert len(losses(tmp_path / "named")) > 0
    with pytest.raises(ValueError, match="method='dinov3' needs a class token, and this Eva has none"):
        make("dinov3", rotary_vit(class_token=False), **DINOV3)
    with pytest.raises(ValueError, match="leave patch_drop_rate out"):
        make("dinov3", rotary_vit(patch_drop_rate=0.5), **DINOV3)
    with pytest.raises(ValueError, match=r"20 x 20 pixels, which are made 2 times smaller .* give multiples of 8"):
        make("dinov3", rotary_vit(), **DINOV3, gram_scale=2).loss([images(side=20)] * 2, 0)
    with pytest.raises(ValueError, match="relative or rotary positions, so no patch can be left out"):
        make("mae", rotary_vit())


def test_gram_loss_equals_plain_arithmetic() -> None:
    student, teacher = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()

    def cosine(x: Any, y: Any) -> float:
        return float(sum(x * y) / (sum(x * x) * sum(y * y)) ** 0.5)

    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for i in range(3):
            for j in range(3):
                total += (cosine(ours[i], ours[j]) - cosine(theirs[i], theirs[j])) ** 2
    assert float(gram_loss(student, teacher)) == pytest.approx(total / (2 * 3 * 3), rel=1e-12)
    turn = torch.linalg.qr(torch.randn(5, 5).double()).Q
    assert float(gram_loss(student, 3 * student @ turn)) == pytest.approx(0, abs=1e-12), "only likeness counts"
    with torch.autocast("cpu", torch.bfloat16):
        assert gram_loss(student.float(), teacher.float()).dtype == torch.float32
        assert float(gram_loss(student.float(), teacher.float())) == pytest.approx(total / 18, rel=1e-5)


def test_the_gram_teacher_is_an_early_teacher_and_renewed_three_times_after_the_start() -> None:
    assert make("dinov3", own_vit(), steps=1_200_000, **DINOV3).gram_copies == (
        200_000,
        1_010_000,
        1_020_000,
        1_030_000,
    )
    method = make("dinov3", own_vit(), steps=600, **DINOV3)
    assert (method.gram_start, method.gram_copies) == (500, (100, 505, 510, 515))
    copied, weight = [], method.gram_embedding.wrapped_model.get_model().cls_token
    for step in range(600):
        before = weight.clone()
        with torch.no_grad():
            method.transformer.model.cls_token.add_(1)
        method.before_step(step)
        if not torch.equal(before, weight):
            copied.append(step)
            assert torch.equal(weight, method.teacher_embedding.wrapped_model.get_model().cls_token)
    assert copied == [100, 505, 510, 515]
    kept = make("dinov3", own_vit(), steps=600, **DINOV3, gram_start_step=0, gram_updates=0)
    assert (kept.gram_start, kept.gram_copies) == (0, (0,)), "the weights that a run begins with"


@pytest.mark.parametrize("scale", [1, 2])
def test_gram_anchoring_counts_from_its_start_on_and_compares_patches_without_registers(scale: int) -> None:
    method = make("dinov3", rotary_vit(), steps=60, **DINOV3, gram_scale=scale)
    teacher = method.gram_embedding.wrapped_model.get_model()
    with torch.no_grad():
        for weight in teacher.blocks.parameters():
            weight.copy_(torch.randn_like(weight))
    views, seen = [images(3, 16 * scale), images(3, 16 * scale), images(3, 8)], []
    method.transformer.norm.register_forward_hook(lambda module, inputs, out: seen.append(out[:, 5:]))
    assert "train_loss/gram" not in method.loss(views, 49)
    results = method.loss(views, 50)
    wanted = teacher.forward_features(torch.cat(views[:2]))[:, 5:].mT.unflatten(2, (4 * scale, 4 * scale))
    if scale > 1:
        wanted = F.interpolate(wanted, (4, 4), mode="bicubic", antialias=True)
    assert seen[-1].shape == (6, 16, 16), "what the student makes of 16 patches of 16 numbers"
    gram = gram_loss(seen[-1], wanted.flatten(2).mT)
    assert float(gram.detach()) > 0.01
    torch.testing.assert_close(results["train_loss/gram"], gram.detach())
    others = results["train_loss/dino"] + results["train_loss/ibot"] + 0.1 * results["train_loss/koleo"]
    torch.testing.assert_close(results["loss"], others + 2 * gram)
    results["loss"].backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    half = method.bfloat16().loss([view.bfloat16() for view in views], 50)["train_loss/gram"]
    torch.testing.assert_close(half.float(), gram.detach(), rtol=0.1, atol=0)
    off = make("dinov3", rotary_vit(), steps=60, **DINOV3, gram_weight=0.0)
    assert "train_loss/gram" not in off.loss([images(), images()], 59)


def test_local_views_have_a_norm_of_their_own() -> None:
    method = make("dinov3", rotary_vit(), **DINOV3)
    for norm, own in ((method.transformer.norm, False), (method.local_norm, True)):
        method.zero_grad()
        method._of_local_views(images(side=8)).square().sum().backward()
        assert (norm.weight.grad is not None and bool(norm.weight.grad.any())) == own
    assert any(p is method.local_norm.weight for group in method.parameter_groups(0.1) for p in group["params"])


def test_schedules_are_constant(tmp_path: Path, data: Path) -> None:
    method = make("dinov3", own_vit(), steps=10**6, **DINOV3)
    assert {method.momentum_at(step) for step in (0, 500_000, 10**6)} == {0.994}
    assert {method.weight_decay(0.04, step) for step in (0, 500_000, 10**6)} == {0.04}
    train(tmp_path, data, "dinov3", model=own_vit(), epochs=2)
    (state,) = checkpoint(tmp_path)["optimizer_states"]
    assert all(group["lr"] == group["initial_lr"] for group in state["param_groups"])
    assert METHODS.get("dinov2").optim.end == 0.001


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dynamic_img_size": False},
        {"name": "vit_small_patch16_rope_mixed_224", "num_reg_tokens": 2},
        {"name": "vit_small_patch16_rope_ape_224"},
        {"use_rot_pos_emb": False, "use_abs_pos_emb": True},
    ],
)
def test_a_transformer_with_rotary_positions_that_is_opened_computes_what_it_did(options: Any) -> None:
    model = rotary_vit(**options).eval()
    opened, pixels = EvaTransformer(model), images(2)
    wanted = model.forward_features(pixels)
    tokens = opened.layers(opened.tokens(pixels), (4, 4))
    assert len(tokens) == 3
    torch.testing.assert_close(tokens[-1], wanted)
    maps = wrap(model).forward_features(pixels)
    torch.testing.assert_close(maps["features"], wanted[:, opened.prefix :].mT.unflatten(2, (4, 4)))
    torch.testing.assert_close(maps["cls_token"], wanted[:, 0])
    depths = [opened.depth_of(name) for name, _ in model.named_parameters()]
    assert set(depths) == {0, 1, 2, 3, 4}
