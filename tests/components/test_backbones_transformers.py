"""Vision transformers, and those that see masked images."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from widefield.components import BEiTPretrainViT, BEiTViT, MAEViT, MaskFeatViT, VisionTransformer
from widefield.components.layers.transformer_layers import RelativePositionBias, sincos_position_embedding

TINY = {"embed_dims": 24, "num_layers": 3, "num_heads": 4, "feedforward_channels": 40}
SMALL = {"arch": TINY, "img_size": 32, "patch_size": 8}
"""16 patches of an image of 32 x 32 pixels."""


def tiny(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **options})


def scrambled(module: Any) -> Any:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def shapes(outs: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    return [tuple(out.shape) for out in outs]


def test_it_computes_the_formula() -> None:
    """Written out head by head, in float64."""
    model = scrambled(tiny(out_type="raw", layer_scale_init_value=0.5).double())
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    patches = image.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, -1)
    x = patches @ model.patch_embed.projection.weight.flatten(1).T + model.patch_embed.projection.bias
    x = torch.cat([model.cls_token.repeat(2, 1, 1), x], dim=1) + model.pos_embed
    for layer in model.layers:
        y = norm(x, layer.ln1)
        qkv = y @ layer.attn.qkv.weight.T + layer.attn.qkv.bias
        heads = []
        for head in range(4):
            q, k, v = (qkv[..., 24 * part + 6 * head :][..., :6] for part in range(3))
            heads.append((q @ k.transpose(1, 2) / 6**0.5).softmax(2) @ v)
        y = torch.cat(heads, 2) @ layer.attn.proj.weight.T + layer.attn.proj.bias
        x = x + layer.gamma1 * y
        first, second = layer.ffn.layers[0][0], layer.ffn.layers[1]
        hidden = norm(x, layer.ln2) @ first.weight.T + first.bias
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + layer.gamma2 * (hidden @ second.weight.T + second.bias)
    torch.testing.assert_close(model(image)[0], norm(x, model.norm1), rtol=1e-10, atol=1e-10)


def norm(x: Tensor, layer: nn.Module) -> Tensor:
    centred = x - x.mean(2, keepdim=True)
    return centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt() * layer.weight + layer.bias


def test_it_computes_what_timm_computes_with_the_same_weights() -> None:
    torch.manual_seed(0)
    reference = scrambled(timm.models.VisionTransformer(32, 8, embed_dim=24, depth=3, num_heads=4, mlp_ratio=2))
    model = tiny(arch={**TINY, "feedforward_channels": 48}, out_type="raw")
    names = {"blocks": "layers", "norm1": "ln1", "norm2": "ln2", "norm": "ln1", "mlp": "ffn", "proj": "projection"}
    weights = {}
    for key, value in reference.state_dict().items():
        parts = key.split(".")
        inside = parts[0] == "blocks"
        renamed = [part if inside and part == "proj" else names.get(part, part) for part in parts]
        weights[".".join(renamed).replace("ffn.fc1", "ffn.layers.0.0").replace("ffn.fc2", "ffn.layers.1")] = value
    result = model.load_state_dict(weights, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["head.weight", "head.bias"])
    image = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(model(image)[0], reference.eval().forward_features(image))


@pytest.mark.parametrize(
    ("out_type", "shape"),
    [("cls_token", (2, 24)), ("raw", (2, 17, 24)), ("featmap", (2, 24, 4, 4)), ("avg_featmap", (2, 24))],
)
def test_outputs_have_the_type_that_was_asked_for(out_type: str, shape: tuple[int, ...]) -> None:
    raw, model = tiny(out_type="raw", out_indices=(0, -1)), tiny(out_type=out_type, out_indices=(0, -1))
    model.load_state_dict(raw.state_dict(), strict=False)
    image = torch.rand(2, 3, 32, 32)
    outs = model(image)
    assert shapes(outs) == [shape, shape]
    for tokens, out in zip(raw(image), outs, strict=True):
        expected = {
            "cls_token": tokens[:, 0],
            "raw": tokens,
            "featmap": tokens[:, 1:].transpose(1, 2).reshape(2, 24, 4, 4),
            "avg_featmap": nn.functional.layer_norm(tokens[:, 1:].mean(1), (24,), eps=1e-6),
        }[out_type]
        torch.testing.assert_close(out, expected)


def test_only_the_last_output_is_normalised_and_only_if_wanted() -> None:
    image = torch.rand(1, 3, 32, 32)
    with_norm, without = (
        tiny(out_type="raw", out_indices=(1, 2)),
        tiny(out_type="raw", out_indices=(1, 2), final_norm=False),
    )
    without.load_state_dict({k: v for k, v in with_norm.state_dict().items() if not k.startswith("ln1.")})
    (early, last), (same, plain) = with_norm(image), without(image)
    assert torch.equal(early, same)
    torch.testing.assert_close(last, with_norm.norm1(plain))


def test_without_a_class_token_there_are_patches_alone() -> None:
    model = tiny(with_cls_token=False, out_type="raw")
    assert model.cls_token is None
    assert shapes(model(torch.rand(1, 3, 32, 32))) == [(1, 16, 24)]
    assert shapes(tiny(with_cls_token=False, out_type="featmap")(torch.rand(1, 3, 40, 16))) == [(1, 24, 5, 2)]


def test_images_of_other_sizes_get_an_interpolated_position_embedding() -> None:
    model = tiny(out_type="featmap")
    assert model.patch_resolution == (4, 4)
    assert shapes(model(torch.rand(1, 3, 48, 20))) == [(1, 24, 6, 3)]
    embedding = model.position_embedding((6, 3))
    grid = model.pos_embed[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, (6, 3), mode="bicubic", align_corners=False)
    torch.testing.assert_close(embedding[:, 1:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(embedding[:, :1], model.pos_embed[:, :1])
    assert model.position_embedding((4, 4)) is model.pos_embed


def test_an_image_is_padded_with_zeros_to_whole_patches() -> None:
    model = tiny(out_type="raw")
    image = torch.rand(1, 3, 29, 30)
    assert torch.equal(model(image)[0], model(nn.functional.pad(image, (0, 2, 0, 3)))[0])


@pytest.mark.parametrize("size", [64, (32, 48)])
def test_weights_for_another_image_size_load(size: Any) -> None:
    small, large = tiny(), tiny(img_size=size)
    large.load_state_dict(small.state_dict())
    assert torch.equal(large.pos_embed, small.position_embedding(large.patch_resolution))
    assert torch.equal(large.layers[1].attn.qkv.weight, small.layers[1].attn.qkv.weight)


def test_an_embedding_that_cannot_be_resized_is_refused() -> None:
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        tiny().load_state_dict(tiny(img_size=(32, 48)).state_dict())


@pytest.mark.parametrize("stages", [-1, 0, 2, 3])
def test_frozen_stages_do_not_train_whatever_the_mode(stages: int) -> None:
    model = tiny(frozen_stages=stages, drop_rate=0.5, pre_norm=True).eval().train()
    expected = {"cls_token", "pos_embed", "patch_embed", "pre_norm"} if stages >= 0 else set()
    expected |= {f"layers.{k}" for k in range(stages)} | ({"ln1"} if stages == 3 else set())
    found = {
        ".".join(name.split(".")[: 2 if name.startswith("layers") else 1])
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    assert found == expected
    assert [layer.training for layer in model.layers] == [k >= stages for k in range(3)]
    assert model.drop_after_pos.training == (stages < 0)


def test_branches_and_tokens_are_dropped_only_in_training() -> None:
    model = tiny(drop_path_rate=0.5, drop_rate=0.1)
    rates = [getattr(layer.drop_path, "p", 0.0) for layer in model.layers]
    assert rates == [0.0, 0.25, 0.5]
    image = torch.rand(2, 3, 32, 32)
    assert not torch.equal(model.train()(image)[0], model(image)[0])
    assert torch.equal(model.eval()(image)[0], model(image)[0])


@pytest.mark.parametrize(
    ("arch", "count"),
    [
        ("b", 85_798_656),
        ("deit-tiny", 5_524_416),
        ("deit-small", 21_665_664),
        ("large", 303_301_632),
        ("huge", 630_764_800),
    ],
)
def test_presets_have_the_published_sizes(arch: str, count: int) -> None:
    patch = 14 if arch == "huge" else 16
    with torch.device("meta"):
        model = VisionTransformer(arch, patch_size=patch)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.patch_resolution == (224 // patch, 224 // patch)


def test_depths_for_learning_rates_are_those_of_the_layers() -> None:
    model = tiny()
    names = [
        "cls_token",
        "patch_embed.projection.weight",
        "layers.0.ln1.weight",
        "layers.2.ffn.layers.1.bias",
        "ln1.bias",
    ]
    assert [model.get_layer_depth(f"backbone.{name}", "backbone.") for name in names] == [
        (0, 5),
        (0, 5),
        (1, 5),
        (3, 5),
        (4, 5),
    ]
    assert model.get_layer_depth("head.layers.0.weight", "backbone.") == (4, 5)


@pytest.mark.parametrize("kind", [VisionTransformer, MAEViT, BEiTPretrainViT, MaskFeatViT])
def test_loaded_weights_stay_and_others_are_initialised(kind: Any, tmp_path: Any) -> None:
    torch.manual_seed(0)
    first = scrambled(kind(**SMALL))
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in first.state_dict().items()}}, tmp_path / "weights.pth")
    pretrained = {"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth"), "prefix": "backbone."}
    second = kind(**SMALL, init_cfg=[pretrained, {"type": "Constant", "val": 7, "layer": "Linear"}])
    second.init_weights()
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    third = scrambled(kind(**SMALL))
    third.init_weights()
    assert bool((third.norm1.weight == 1).all())
    assert third.cls_token.abs().max().item() < 0.15
    assert 0 < third.layers[0].attn.qkv.weight.abs().max().item() < 0.3


# --- masked autoencoders


def test_the_encoder_of_mae_has_the_known_sizes() -> None:
    with torch.device("meta"):
        model = MAEViT(arch="b")
        image = torch.rand(2, 3, 224, 224)
        assert shapes(model(image)) == [(2, 50, 768), (2, 196), (2, 196)]
        assert shapes(model(image, mask=None)) == [(2, 197, 768)]
    assert sum(parameter.numel() for parameter in model.parameters()) == 85_798_656
    assert not model.pos_embed.requires_grad


def test_random_masking_keeps_what_it_says() -> None:
    model = MAEViT(**SMALL)
    x = torch.rand(2, 16, 24)
    torch.manual_seed(0)
    visible, mask, ids_restore = model.random_masking(x, 0.75)
    kept = ids_restore.argsort(1)[:, :4]
    assert kept.tolist() == [[12, 2, 3, 13], [11, 2, 12, 3]]
    assert ids_restore[0].tolist() == [10, 14, 1, 2, 5, 13, 9, 15, 8, 12, 6, 7, 0, 3, 4, 11]
    assert mask.sum(1).tolist() == [12, 12]
    assert torch.equal(visible, torch.stack([one[ids] for one, ids in zip(x, kept, strict=True)]))
    filled = torch.cat([visible, torch.zeros(2, 12, 24)], 1).gather(1, ids_restore[..., None].expand(-1, -1, 24))
    assert torch.equal(filled, x * (1 - mask)[..., None])


@pytest.mark.parametrize(
    ("length", "ratio", "kept"), [(10, 0.9, 1), (196, 0.6, 78), (16, 0.7, 4), (196, 0.75, 49), (5, 0, 5)]
)
def test_the_number_of_kept_patches_is_rounded_down_but_not_by_floating_point(
    length: int, ratio: float, kept: int
) -> None:
    assert MAEViT(**SMALL).random_masking(torch.rand(1, length, 24), ratio)[0].shape[1] == kept


def test_masked_features_are_those_of_the_visible_patches_alone() -> None:
    model = scrambled(MAEViT(**SMALL)).eval()
    image = torch.rand(2, 3, 32, 32)
    torch.manual_seed(1)
    latent, mask, _ = model(image)
    removed = mask.reshape(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).bool()
    for noise, same in ((removed, True), (~removed, False)):
        torch.manual_seed(1)
        assert torch.equal(model(torch.where(noise, 5.0, image))[0], latent) == same


def test_nothing_masked_is_the_plain_transformer() -> None:
    model = MAEViT(**SMALL, mask_ratio=0)
    image = torch.rand(2, 3, 40, 32)
    (plain,) = model(image, mask=False)
    latent, mask, ids_restore = model(image)
    order = ids_restore.argsort(1)
    assert not mask.any()
    torch.testing.assert_close(latent[:, 1:], plain[:, 1:].gather(1, order[..., None].expand(-1, -1, 24)))
    torch.testing.assert_close(latent[:, 0], plain[:, 0])


def test_the_position_embedding_of_mae_is_the_formula_and_stays() -> None:
    model = MAEViT(**{**SMALL, "img_size": (32, 24)})
    for row in range(4):
        for column in range(3):
            angles = [[place * 10000 ** (-k / 6) for k in range(6)] for place in (row, column)]
            expected = torch.cat([f(torch.tensor(a)) for a in angles for f in (torch.sin, torch.cos)])
            torch.testing.assert_close(model.pos_embed[0, 1 + 3 * row + column], expected)
    assert not model.pos_embed[0, 0].any()
    before = model.pos_embed.clone()
    model.requires_grad_(True)
    model.train()
    model.init_weights()
    assert torch.equal(model.pos_embed, before)
    assert not model.pos_embed.requires_grad
    with pytest.raises(ValueError, match="embed_dims=6 must be a multiple of 4"):
        sincos_position_embedding((2, 2), 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.99}, "mask_ratio=0.99 keeps 0 of 16 patches; it must be from 0 to 0.9375"),
        ({"mask_ratio": -0.1}, "mask_ratio=-0.1 keeps 17 of 16"),
        ({"with_cls_token": False}, "MAEViT needs its class token"),
    ],
)
def test_masks_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAEViT(**SMALL, **options)


class Users(VisionTransformer):
    """The encoder of the page, with its missing `self` and its mask made to mean what they should."""

    def __init__(self, mask_ratio: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pos_embed.requires_grad = False
        self.mask_ratio = mask_ratio
        self.num_patches = self.patch_resolution[0] * self.patch_resolution[1]

    def init_weights(self) -> None:
        super().init_weights()

    def random_masking(self, x: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        return MAEViT.random_masking(self, x, mask_ratio)

    def forward(self, x: Tensor, mask: bool | None = True) -> tuple[Tensor, ...]:
        if mask is None or mask is False:
            return super().forward(x)
        B = x.shape[0]
        x = self.patch_embed(x)[0]
        x = x + self.pos_embed[:, 1:, :]
        x, mask, ids_restore = self.random_masking(x, self.mask_ratio)
        cls_token = self.cls_token + self.pos_embed[:, :1, :]
        cls_tokens = cls_token.expand(B, -1, -1)
        x = torch.cat((cls_tokens, x), dim=1)
        for _, layer in enumerate(self.layers):
            x = layer(x)
        x = self.norm1(x)
        return (x, mask, ids_restore)


def test_the_subclass_of_the_page_works_and_equals_ours() -> None:
    users, ours = Users(0.75, **SMALL, out_type="raw"), MAEViT(**SMALL)
    users.init_weights()
    ours.load_state_dict(users.state_dict())
    assert users.num_patches == 16
    image = torch.rand(2, 3, 32, 32)
    outs = []
    for model in (users, ours):
        torch.manual_seed(3)
        outs.append(model(image))
    assert all(torch.equal(one, other) for one, other in zip(*outs, strict=True))
    assert torch.equal(users(image, mask=False)[0], ours(image, mask=None)[0])


# --- BEiT and MaskFeat


@pytest.mark.parametrize("kind", [BEiTPretrainViT, MaskFeatViT])
@pytest.mark.parametrize("mask", [None, (2, 14, 14)], ids=["unmasked", "masked"])
def test_masked_transformers_have_the_known_sizes(kind: Any, mask: tuple[int, ...] | None) -> None:
    with torch.device("meta"):
        out = kind(arch="base")(torch.rand(2, 3, 224, 224), mask if mask is None else torch.ones(mask))
    assert shapes((out,) if isinstance(out, Tensor) else out) == [(2, 197, 768)]


def mask_of(*masked: int) -> Tensor:
    mask = torch.zeros(1, 16)
    mask[0, list(masked)] = 1
    return mask.reshape(1, 4, 4)


@pytest.mark.parametrize("kind", [BEiTPretrainViT, MaskFeatViT])
def test_masked_patches_become_the_mask_token(kind: Any) -> None:
    model = scrambled(kind(**SMALL)).eval()
    image, mask = torch.rand(1, 3, 32, 32), mask_of(0, 5)
    out = model(image, mask)
    out = out if isinstance(out, Tensor) else out[0]
    assert out.shape == (1, 17, 24)
    changed = image.clone()
    changed[..., :8, :8] = 3
    for same in (mask.bool(), mask.flatten(1), mask.long()):
        again = model(changed, same)
        torch.testing.assert_close(again if isinstance(again, Tensor) else again[0], out)
    assert not torch.allclose(model(changed)[0], model(image)[0])
    nothing = model(image, torch.zeros(1, 4, 4))
    torch.testing.assert_close(nothing if isinstance(nothing, Tensor) else nothing[0], model(image)[0])
    with pytest.raises(ValueError, match=r"the mask has the shape \(1, 3, 3\); 1 images of 16 patches need"):
        model(image, torch.zeros(1, 3, 3))


def test_maskfeat_adds_positions_behind_the_mask_and_normalises() -> None:
    model = scrambled(MaskFeatViT(**SMALL)).eval()
    x = model.mask_token.expand(1, 16, -1)
    x = torch.cat([model.cls_token, x], 1) + model.pos_embed
    for layer in model.layers:
        x = layer(x)
    torch.testing.assert_close(model(torch.rand(1, 3, 32, 32), torch.ones(1, 4, 4)), model.norm1(x))


@pytest.mark.parametrize(
    "options", [{}, {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}], ids=["shared", "own"]
)
def test_beit_gives_the_tokens_of_its_layers_at_any_size(options: dict[str, Any]) -> None:
    model = scrambled(BEiTPretrainViT(**SMALL, out_indices=(1, 2), **options))
    assert model.pos_embed is None
    assert shapes(model(torch.rand(2, 3, 32, 32), torch.zeros(2, 4, 4))) == [(2, 17, 24)] * 2
    outs = model(torch.rand(2, 3, 40, 32))
    assert shapes(outs) == [(2, 21, 24)] * 2
    outs[-1].square().sum().backward()
    tables = [p.grad for name, p in model.named_parameters() if "relative_position_bias_table" in name]
    assert len(tables) == (3 if options else 1)
    assert all(bool(table.any()) for table in tables)
    assert (model.shared_rel_pos_bias is None) == bool(options)


def test_the_bias_depends_on_the_offset_alone_and_reaches_the_attention() -> None:
    bias = scrambled(RelativePositionBias((3, 2), 4))
    table, out = bias.relative_position_bias_table, bias()
    assert out.shape == (4, 7, 7)
    for one in range(6):
        for other in range(6):
            down, right = one // 2 - other // 2, one % 2 - other % 2
            expected = table[(down + 2) * 3 + right + 1]
            assert torch.equal(out[:, 1 + one, 1 + other], expected)
    assert all(torch.equal(row, table[15]) for row in out[:, 0, 1:].T)
    assert all(torch.equal(row, table[16]) for row in out[:, 1:, 0].T)
    assert torch.equal(out[:, 0, 0], table[17])
    model = scrambled(BEiTPretrainViT(**SMALL)).eval()
    layer, tokens = model.layers[0], torch.rand(2, 17, 24)
    q, k, v = (
        layer.attn.qkv.weight.chunk(3)[part] @ tokens.transpose(1, 2) + shift[:, None]
        for part, shift in enumerate((layer.attn.q_bias, torch.zeros(24), layer.attn.v_bias))
    )
    q, k, v = (part.reshape(2, 4, 6, 17).transpose(2, 3) for part in (q, k, v))
    weights = (q @ k.transpose(2, 3) / 6**0.5 + model.shared_rel_pos_bias).softmax(3)
    expected = layer.attn.proj((weights @ v).transpose(1, 2).reshape(2, 17, 24))
    torch.testing.assert_close(layer.attn(tokens, model.shared_rel_pos_bias), expected, rtol=1e-4, atol=1e-4)


def test_biases_for_another_image_size_load() -> None:
    small, large = scrambled(BEiTViT(**SMALL)), BEiTViT(**{**SMALL, "img_size": 64})
    large.load_state_dict(small.state_dict())
    bias, other = (model.layers[1].rel_pos_bias for model in (small, large))
    torch.testing.assert_close(bias((8, 8)), other())
    assert torch.equal(bias.relative_position_bias_table[-3:], other.relative_position_bias_table[-3:])


def test_weights_of_beit_begin_smaller_with_depth() -> None:
    torch.manual_seed(0)
    model = BEiTPretrainViT(arch={**TINY, "embed_dims": 96})
    model.init_weights()
    for number, layer in enumerate(model.layers, 1):
        for weight in (layer.attn.proj.weight, layer.ffn.layers[1].weight):
            assert weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.05)
    assert layer.gamma1[0].item() == pytest.approx(0.1)
    assert 0 < model.mask_token.std().item() < 0.03


def test_the_one_for_fine_tuning_averages_patches_and_freezes_its_biases() -> None:
    model = BEiTViT(**SMALL, frozen_stages=2)
    assert shapes(model(torch.rand(2, 3, 32, 32))) == [(2, 24)]
    trains = [layer.rel_pos_bias.relative_position_bias_table.requires_grad for layer in model.layers]
    assert trains == [False, False, True]
    shared = BEiTPretrainViT(**SMALL, frozen_stages=3)
    assert {name for name, parameter in shared.named_parameters() if parameter.requires_grad} == {"mask_token"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VisionTransformer("bas"), "arch='bas' is unknown; did you mean base"),
        (lambda: tiny(arch={"embed_dims": 8}), "must have embed_dims, num_layers, num_heads, feedforward_channels"),
        (lambda: tiny(arch={**TINY, "num_heads": 5}), "embed_dims=24 cannot be shared evenly by num_heads=5"),
        (lambda: tiny(out_type="feat"), "out_type='feat' is unknown; did you mean featmap"),
        (lambda: tiny(with_cls_token=False), "out_type='cls_token' needs with_cls_token=True"),
        (lambda: tiny(out_indices=(3,)), r"out_indices=\(3,\) must be from 0 to 2"),
        (lambda: tiny(frozen_stages=4), "frozen_stages=4 must be from -1"),
        (lambda: tiny(drop_path_rate=1.5), "drop_path_rate=1.5"),
        (lambda: BEiTViT(**SMALL, use_shared_rel_pos_bias=True), "exclude each other"),
        (lambda: BEiTViT(**SMALL, with_cls_token=False), "BEiTViT needs its class token"),
    ],
)
def test_wrong_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
