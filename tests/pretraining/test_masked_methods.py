"""Methods that hide patches from a vision transformer, MAE, BEiT and MaskFeat above all; and LeJEPA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.pretraining.tiny import TinyWrapper, small, timm_vit, tokenizer, train, write_images
from tests.pretraining.tiny_vit import ARCH, TRANSFORMERS, check_a_run, images, make, own_vit
from widefield.components.backbones.masked_transformers import BEiTPretrainViT, MaskFeatViT
from widefield.components.backbones.vision_transformer import VisionTransformer
from widefield.components.target_generators.target_generators import VQKD, HOGGenerator
from widefield.pretraining import METHODS, EmbeddingModel, Run
from widefield.pretraining.methods.transformers import OwnTransformer, Transformer, block_masks

DECODER = small("mae")


def vqkd() -> VQKD:
    torch.manual_seed(0)
    encoder = {"type": "VisionTransformer", "arch": ARCH, "img_size": 16, "patch_size": 4, "out_type": "featmap"}
    return VQKD(encoder, num_embed=24, embed_dims=8, allow_random_weights=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("method", TRANSFORMERS)
@pytest.mark.parametrize("model", [timm_vit, own_vit])
def test_a_run_repeats_goes_on_at_the_step_and_exports(method: str, model: Any, tmp_path: Path, data: Path) -> None:
    check_a_run(method, model, tmp_path, data)


@pytest.mark.parametrize("method", TRANSFORMERS)
def test_what_cannot_hide_patches_is_refused(method: str, tmp_path: Path, data: Path) -> None:
    """A convnet and an embedding layer are refused, and `out` stays as it was."""
    for model, more, message in (
        (TinyWrapper(), {}, rf"method='{method}' hides patches .* a Sequential cannot: its layers mix neighbouring"),
        (timm_vit(), {"embed_dim": 4}, rf"embed_dim: {method} trains the tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "out", data, method, model=model, **more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["mae", "maskfeat", "beit"])
def test_all_patches_cannot_be_hidden_nor_parts_of_them(method: str) -> None:
    with pytest.raises(ValueError, match=r"mask_ratio=1\.0 must be above 0 and below 1"):
        make(method, timm_vit(), **{**small(method), "mask_ratio": 1.0})
    with pytest.raises(ValueError, match=r"18 x 18 pixels, which patches of 4 do not fill; give multiples of 4"):
        make(method, timm_vit(), **small(method)).loss([images(2, 18)], 0)


def test_transformers_that_are_opened_compute_what_they_did_before() -> None:
    pixels = images(2, 24)
    for model in (timm_vit(reg_tokens=2), timm_vit(class_token=False, global_pool="avg")):
        opened = Transformer(model.eval())
        tokens = opened.layers(opened.tokens(pixels), (6, 6))
        assert len(tokens) == 3
        torch.testing.assert_close(tokens[-1], model.forward_features(pixels))
    for cls in (VisionTransformer, BEiTPretrainViT):
        own = own_vit(cls=cls, out_type="raw").eval()
        (wanted,) = own(pixels)
        parts = OwnTransformer(own)
        torch.testing.assert_close(parts.layers(parts.tokens(pixels), (6, 6))[-1], wanted)


def test_a_mask_token_hides_a_patch_and_a_models_own_one_is_used() -> None:
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 0, 0] = True
    pixels = images(2)
    changed = pixels.clone()
    changed[0, :, 4:8, 8:12] += 1
    changed[1, :, :4, :4] -= 1
    for model in (timm_vit(), own_vit(cls=MaskFeatViT)):
        method = make("maskfeat", model)
        one, two = (method.transformer.tokens(x, mask, method.mask_token) for x in (pixels, changed))
        assert torch.equal(one, two)
        assert not torch.equal(method.transformer.tokens(pixels), method.transformer.tokens(changed))
    assert method.mask_token is model.mask_token, "so that it is exported"


def test_block_masks_hide_their_share_and_one_patch_at_least() -> None:
    torch.manual_seed(0)
    masks = block_masks((14, 14), [0.4, 0.1, 0.001])
    assert [int(mask.sum()) for mask in masks] == [78, 20, 1]


def test_mae_compares_hidden_patches_alone_in_double_precision() -> None:
    method = make("mae", own_vit(), **DECODER).double()
    pixels, seen = images(3).double(), {}
    method.decoder.register_forward_hook(lambda _, inputs, out: seen.update(place=inputs[1], out=out, given=inputs[0]))
    loss = method.loss([pixels], 0)["loss"]
    assert seen["given"].shape == (3, 1 + 4, 16), "the class token and a quarter of the 16 patches"
    total, hidden = 0.0, 0
    for k in range(3):
        for n in range(16):
            if seen["place"][k, n] < 4:
                continue
            y, x = 4 * (n // 4), 4 * (n % 4)
            patch = pixels[k, :, y : y + 4, x : x + 4].permute(1, 2, 0).flatten()
            target = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            total, hidden = total + (seen["out"][k, n] - target).square().mean(), hidden + 1
    assert hidden == 3 * 12
    torch.testing.assert_close(loss, total / hidden, rtol=1e-12, atol=0)


def test_what_mae_hides_cannot_be_seen_by_the_encoder() -> None:
    method, pixels = make("mae", timm_vit(), **DECODER).eval(), images(1)
    seen: dict[str, Any] = {}
    method.decoder.register_forward_hook(lambda _, inputs, out: seen.update(latent=inputs[0], place=inputs[1]))
    outs = []
    for change in (0.0, 1.0):
        torch.manual_seed(3)
        changed = pixels.clone()
        for n in (seen["place"][0] >= 4).nonzero()[:, 0].tolist() if change else ():
            changed[:, :, 4 * (n // 4) : 4 * (n // 4) + 4, 4 * (n % 4) : 4 * (n % 4) + 4] += change
        method.loss([changed], 0)
        outs.append(seen["latent"])
    assert torch.equal(*outs)


def test_mae_takes_views_of_other_sizes_registers_and_no_class_token() -> None:
    for model in (timm_vit(reg_tokens=2), timm_vit(class_token=False, global_pool="avg")):
        method = make("mae", model, **DECODER)
        assert all(method.loss([images(2, side)], 0)["loss"].isfinite() for side in (16, 24))
        assert not any("pos_embed" in name and "decoder" in name for name in method.state_dict())
    with pytest.raises(ValueError, match="BEiTPretrainViT has relative or rotary positions"):
        make("mae", own_vit(cls=BEiTPretrainViT))


def test_maskfeat_compares_histograms_of_hidden_patches_in_double_precision() -> None:
    method = make("maskfeat", own_vit()).double()
    pixels = images(3).double()
    torch.manual_seed(5)
    loss = method.loss([pixels], 0)["loss"]
    torch.manual_seed(5)
    mask = torch.stack(block_masks((4, 4), [0.4] * 3))
    tokens = method.transformer.tokens(pixels, mask, method.mask_token)
    predicted = method.head(method.transformer.layers(tokens, (4, 4))[-1][:, 1:])
    targets = HOGGenerator(9, 2, 4, 4)(pixels)
    wanted = (predicted - targets).square().mean(-1)[mask.flatten(1)].mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=0)


def test_beit_1_is_the_cross_entropy_of_hidden_tokens() -> None:
    method = make("beit", timm_vit(), target_generator=tokenizer())
    pixels = images(3)
    torch.manual_seed(5)
    loss = method.loss([pixels], 0)["loss"]
    torch.manual_seed(5)
    mask = torch.stack(block_masks((4, 4), [0.4] * 3))
    unit = pixels * method.std + method.mean
    tokens = tokenizer()(0.1 + 0.8 * F.interpolate(unit, (32, 32), mode="bilinear")).argmax(1).flatten(1)
    features = method.transformer.layers(method.transformer.tokens(pixels, mask, method.mask_token), (4, 4))[-1]
    scores = method.head.cls_head(features[:, 1:])
    torch.testing.assert_close(loss, F.cross_entropy(scores[mask.flatten(1)], tokens[mask.flatten(1)]))


@pytest.mark.parametrize("model", [timm_vit, lambda: own_vit(cls=BEiTPretrainViT)])
def test_beit_2_predicts_twice_and_keeps_its_generator_out_of_checkpoints(model: Any) -> None:
    method = make("beit", model(), target_generator=vqkd())
    results = method.loss([images()], 0)
    parts = results["train_loss/final"] + results["train_loss/class_token"]
    torch.testing.assert_close(results["loss"].detach(), parts)
    results["loss"].backward()
    assert method.neck.patch_aggregation[0].attn.proj.weight.grad is not None
    assert not any("generator" in name or "quantize" in name for name in method.state_dict())


def test_beit_needs_weights(tmp_path: Path, data: Path) -> None:
    with pytest.raises(ValueError, match="makes no sense with random weights"):
        train(tmp_path, data, "beit", model=timm_vit(), method_args={"target_generator": {"type": "DALLEEncoder"}})
    with pytest.raises(ValueError, match="is a HOGGenerator; give a DALLEEncoder"):
        make("beit", timm_vit(), target_generator=HOGGenerator())


def test_the_tokens_of_beit_are_of_the_pixels_however_views_are_normalised(tmp_path: Path, data: Path) -> None:
    seen: list[Tensor] = []
    generator = tokenizer()
    generator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for number, normalize in enumerate(({}, {"mean": (0.2,) * 3, "std": (3.0,) * 3})):
        views = {"normalize": normalize}
        train(
            tmp_path / str(number),
            data,
            "beit",
            model=timm_vit(),
            method_args={"target_generator": generator},
            transform_args=views,
        )
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(first) == 2
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)
        assert one.min() >= 0.1 - 1e-6 and one.max() <= 0.9 + 1e-6


def test_lejepa_trains_any_model_with_and_without_local_views(tmp_path: Path, data: Path) -> None:
    for name, local in (("with", {"view_size": 8, "num_views": 2}), ("without", None)):
        options = {"method_args": {"hidden_dim": 16, "output_dim": 8}, "transform_args": {"local_view": local}}
        train(tmp_path / name, data, "lejepa", model=TinyWrapper(), **options)


def test_lejepa_is_a_distance_of_views_and_one_from_the_normal_distribution() -> None:
    torch.manual_seed(0)
    embedding, run = EmbeddingModel(TinyWrapper()), Run(12, 100, 6, 10)
    method = METHODS.get("lejepa")(embedding, run, hidden_dim=16, output_dim=3, weight=0.3, directions=5).double()
    views = [torch.rand(6, 3, side, side, dtype=torch.float64) for side in (16, 16, 8, 8)]
    torch.manual_seed(1)
    loss = method.loss(views, 0)["loss"]
    z = torch.stack([*method.head(embedding.vectors(torch.cat(views[:2]))).chunk(2)])
    z = torch.cat([z, torch.stack(method.head(embedding.vectors(torch.cat(views[2:]))).chunk(2))])
    distance = sum((view - (z[0] + z[1]) / 2).square().mean() for view in z) / 4
    torch.manual_seed(1)
    directions = F.normalize(torch.randn(3, 5, dtype=torch.float64), dim=0)
    t = torch.linspace(0, 3, 17, dtype=torch.float32).double()
    window, total = torch.exp(-t.square() / 2), 0.0
    for view in z:
        for direction in directions.T:
            angles = (view @ direction)[:, None] * t
            error = (angles.cos().mean(0) - window).square() + angles.sin().mean(0).square()
            total = total + 2 * 6 * torch.trapezoid(error * window, dx=3 / 16) / (4 * 5)
    torch.testing.assert_close(loss, 0.3 * total + 0.7 * distance, rtol=1e-6, atol=0)
