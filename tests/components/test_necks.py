"""Necks, against formulas and known shapes."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from widefield.components import BEiTV2Neck, LinearNeck, MAEPretrainDecoder, NonLinearNeck
from widefield.components.component import build_activation_layer
from widefield.registry import MODELS, UnknownNameError

TINY = {"embed_dims": 8, "num_layers": 4, "num_heads": 2, "feedforward_channels": 16}


@pytest.fixture
def registrations() -> Iterator[None]:
    """Forget what a test registers."""
    yield
    for name in [name for name, held in MODELS._registered.items() if held.component.__module__ == __name__]:
        del MODELS._registered[name]


def test_activations_are_built_by_name() -> None:
    assert isinstance(build_activation_layer({"type": "HSwish"}), nn.Hardswish)
    assert build_activation_layer({"type": "LeakyReLU", "negative_slope": 0.5})(torch.tensor(-1.0)) == -0.5
    assert isinstance(build_activation_layer(None), nn.Identity)
    with pytest.raises(UnknownNameError, match="no activation named 'Tan'; did you mean Tanh"):
        build_activation_layer({"type": "Tan"})


def test_a_linear_neck_is_linear_layer_norm_and_activation() -> None:
    neck = LinearNeck(3, 2, norm_cfg={"type": "LN"}, act_cfg={"type": "ReLU"})
    first, last = torch.rand(4, 5), torch.rand(4, 3)
    (out,) = neck((first, last))
    torch.testing.assert_close(out, nn.functional.layer_norm(last @ neck.fc.weight.T + neck.fc.bias, (2,)).relu())
    assert torch.equal(neck([first, last])[0], out)
    assert torch.equal(neck(last)[0], out)


@pytest.mark.parametrize("gap_dim", [1, 2, 3])
def test_a_linear_neck_averages_positions_first(gap_dim: int) -> None:
    neck = LinearNeck(3, 2, gap_dim, norm_cfg=None)  # type: ignore[arg-type]
    maps = torch.rand(4, 3, *[2] * gap_dim)
    (out,) = neck((maps,))
    torch.testing.assert_close(out, neck.fc(maps.flatten(2).mean(2)))


def test_a_linear_neck_takes_every_token_for_a_vector() -> None:
    neck = LinearNeck(3, 5)
    tokens = torch.rand(2, 5, 3)
    (out,) = neck(tokens)
    values = neck.fc(tokens)
    expected = (values - values.mean((0, 1))) / (values.var((0, 1), correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(out, expected)


def test_necks_refuse_what_they_cannot_use() -> None:
    with pytest.raises(AssertionError, match="gap_dim=4 is not one of 0, 1, 2, 3"):
        LinearNeck(3, 2, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a tuple of tensors or a tensor, not dict"):
        LinearNeck(3, 2)({"x": torch.rand(2, 3)})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not tuple"):
        LinearNeck(3, 2)(())
    with pytest.raises(ValueError, match="num_layers=0"):
        NonLinearNeck(3, 4, 2, num_layers=0)
    with pytest.raises(ValueError, match="with dim=2 it has 4 axes"):
        NonLinearNeck(3, 4, 2)(torch.rand(2, 3))


def test_a_nonlinear_neck_alternates_layers() -> None:
    kinds = [type(layer).__name__ for layer in NonLinearNeck(3, 4, 2, num_layers=3, norm_cfg={"type": "BN1d"}).layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    neck = NonLinearNeck(3, 4, 2)
    first, norm, _, last, last_norm = neck.layers
    assert isinstance(norm, nn.SyncBatchNorm)
    assert (first.bias, last.bias) == (None, None)
    maps = torch.rand(6, 3, 2, 2)
    (out,) = neck((maps,))
    torch.testing.assert_close(out, last_norm(last(norm(first(maps.mean((2, 3)))).relu())))
    assert out.mean(0).abs().max() < 1e-6


def test_a_nonlinear_neck_has_the_last_layer_that_was_asked_for() -> None:
    predictor = NonLinearNeck(
        3, 4, 2, with_bias=True, with_last_bias=True, with_last_bn=False, with_avg_pool=False, norm_cfg={"type": "LN"}
    )
    assert [type(layer) for layer in predictor.layers] == [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]
    assert all(layer.bias is not None for layer in predictor.layers if isinstance(layer, nn.Linear))
    assert predictor((torch.rand(5, 3),))[0].shape == (5, 2)
    affine = NonLinearNeck(3, 4, 2, with_last_bn_affine=False)
    assert (affine.layers[1].weight is None, affine.layers[-1].weight) == (False, None)


def test_the_decoder_of_mae_has_the_known_sizes() -> None:
    decoder = MAEPretrainDecoder(embed_dim=768)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 26_109_184
    ids = torch.rand(2, 196).argsort(1)
    with torch.no_grad():
        assert decoder(torch.rand(2, 50, 768), ids).shape == (2, 196, 768)
    assert not decoder.decoder_pos_embed.requires_grad
    with torch.no_grad():
        small = MAEPretrainDecoder(decoder_depth=1, predict_feature_dim=5)
        assert small(torch.rand(1, 50, 1024), ids[:1]).shape == (1, 196, 5)


def tiny_decoder(**options: int) -> MAEPretrainDecoder:
    sizes = {"num_patches": 16, "embed_dim": 4, "decoder_embed_dim": 8, "decoder_num_heads": 2, "decoder_depth": 1}
    decoder = MAEPretrainDecoder(patch_size=2, **(sizes | options))
    decoder.init_weights()
    return decoder


def test_positions_of_the_decoder_are_sines_and_cosines_of_rows_and_columns() -> None:
    """Vaswani et al., 2017, in two dimensions: omega_k = 10000^(-k / (d / 4))."""
    d = 8
    (positions,) = tiny_decoder().decoder_pos_embed.tolist()
    assert positions[0] == [0] * d
    omega = [10_000 ** (-k / (d / 4)) for k in range(d // 4)]
    for patch, position in enumerate(positions[1:]):
        expected = [f(index * o) for index in divmod(patch, 4) for f in (math.sin, math.cos) for o in omega]
        assert position == pytest.approx(expected, abs=1e-6)


def test_the_decoder_puts_tokens_where_they_were_and_mask_tokens_elsewhere() -> None:
    decoder = tiny_decoder()
    seen: list[torch.Tensor] = []
    decoder.decoder_blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    order = torch.rand(2, 16).argsort(1)
    tokens = torch.rand(2, 1 + 4, 4)
    decoder(tokens, order.argsort(1))
    expected = decoder.mask_token.expand(2, 17, -1).clone()
    expected[:, 0] = decoder.decoder_embed(tokens[:, 0])
    for image in range(2):
        for k in range(4):
            expected[image, 1 + order[image, k]] = decoder.decoder_embed(tokens[image, 1 + k])
    torch.testing.assert_close(seen[0], expected + decoder.decoder_pos_embed)
    assert 0 < decoder.mask_token.std() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_patches": 15}, "num_patches=15 must be a square number, such as 9"),
        ({"num_patches": 0}, "num_patches=0 must be a square number"),
        ({"decoder_embed_dim": 6}, "embed_dims=6 must be a multiple of 4"),
    ],
)
def test_the_decoder_refuses(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_decoder(**options)


def test_the_decoder_says_when_the_images_have_another_size() -> None:
    with pytest.raises(ValueError, match="there are 9 patches, and num_patches=16"):
        tiny_decoder()(torch.rand(1, 4, 4), torch.arange(9)[None])


def test_patch_aggregation_reads_the_early_patches_and_the_final_class_token() -> None:
    neck = BEiTV2Neck(num_layers=1, early_layers=2, backbone_arch=TINY)
    neck.init_weights()
    early, final = torch.rand(2, 2, 5, 8)
    bias = torch.rand(2, 5, 5)
    x, x_cls_pt = neck((early, final), rel_pos_bias=bias)
    torch.testing.assert_close(x, neck.fc_norm(final[:, 1:]))
    tokens = torch.cat([final[:, :1], early[:, 1:]], 1)
    torch.testing.assert_close(x_cls_pt, neck.fc_norm(neck.patch_aggregation[0](tokens, bias))[:, 1:])
    changed = final.clone()
    changed[:, 1:] += 1
    torch.testing.assert_close(neck((early, changed), bias)[1], x_cls_pt, msg="final patches must not leak")
    assert not torch.allclose(neck((early, final))[1], x_cls_pt)


def test_patch_aggregation_is_initialised_as_the_layers_that_come_after_the_early_ones() -> None:
    torch.manual_seed(0)
    arch = {**TINY, "embed_dims": 64, "feedforward_channels": 256}
    neck = BEiTV2Neck(num_layers=2, early_layers=9, backbone_arch=arch, drop_path_rate=0.1, layer_scale_init_value=0.2)
    neck.init_weights()
    for k, block in enumerate(neck.patch_aggregation, 10):
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert block.ffn.layers[1].weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * k), rel=0.1)
        assert block.attn.proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * k), rel=0.1)
        assert block.drop_path.p == pytest.approx(0.1 * (k - 1) / 10)
        assert block.gamma1.unique().tolist() == pytest.approx([0.2])
    assert BEiTV2Neck(layer_scale_init_value=0.0, backbone_arch=TINY).patch_aggregation[0].gamma1 is None


@pytest.mark.parametrize("arch", ["tiny", {"embed_dims": 8}])
def test_patch_aggregation_refuses_unknown_architectures(arch) -> None:
    with pytest.raises(ValueError, match="is not one of 'base', 'large', nor a dictionary of embed_dims, num_layers"):
        BEiTV2Neck(backbone_arch=arch)


@pytest.mark.usefixtures("registrations")
def test_a_neck_of_a_user_is_built_by_name() -> None:
    """The page's example, under another name, with the call of the base class that it lacks."""

    @MODELS.register_module()
    class PoolOfAUser(nn.Module):
        def __init__(self):
            super().__init__()
            self.gap = nn.AdaptiveAvgPool2d((1, 1))

        def forward(self, inputs):
            outs = self.gap(inputs)
            return outs.view(inputs.size(0), -1)

    maps = torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(MODELS.build({"type": "PoolOfAUser"})(maps), maps.mean((2, 3)))
