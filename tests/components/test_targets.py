"""Target generators, against formulas and known values; nothing moves them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from widefield.components import VQKD, Component, DALLEEncoder, HOGGenerator
from widefield.components.target_generators.target_generators import BaseTargetGenerator, CosineQuantizer
from widefield.registry import MODELS


class TinyEncoder(Component):
    """A map of patches with a batch norm and dropout, which change in training mode."""

    def __init__(self, embed_dims: int = 8, out_type: str = "featmap") -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.out_type = out_type
        self.layers = nn.Sequential(nn.Conv2d(3, embed_dims, 4, 4), nn.BatchNorm2d(embed_dims), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.layers(x)
        return (x if self.out_type == "featmap" else x.flatten(2).mT,)


TINY: dict[str, Any] = {"encoder_config": {"type": TinyEncoder}, "num_embed": 16, "embed_dims": 4}


def test_hog_has_the_known_sizes() -> None:
    hog = HOGGenerator()
    assert hog(torch.rand(2, 3, 224, 224)).shape == (2, 196, 108)
    assert hog.out.shape == (2, 3, 9, 28, 28)
    torch.testing.assert_close(hog.out.norm(dim=2), torch.ones(2, 3, 28, 28))
    assert hog.gaussian[0, 0].item() == pytest.approx(0.00221355, abs=5e-9)
    assert hog.gaussian[7, 7].item() == pytest.approx(0.00531002, abs=5e-9)
    assert hog.gaussian.sum().item() == pytest.approx(1)
    assert not hog.state_dict(), "there is nothing to load"


@pytest.mark.parametrize(("slope", "bin_of_it"), [((0, 1), 4), ((0, -1), 4), ((1, 0), 0), ((-1, 0), 0)])
def test_hog_of_a_ramp_is_one_angle(slope: tuple[int, int], bin_of_it: int) -> None:
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    targets = HOGGenerator()((slope[0] * rows + slope[1] * columns).expand(1, 3, -1, -1))
    expected = torch.zeros(108)
    for channel in range(3):
        expected[36 * channel + 4 * bin_of_it :][:4] = 1
    torch.testing.assert_close(targets, expected.expand(1, 6, -1))


def test_hog_of_a_constant_image_is_nothing() -> None:
    assert not HOGGenerator()(torch.full((1, 3, 32, 32), 0.3)).any()


def test_hog_is_its_definition_pixel_by_pixel() -> None:
    """Dalal and Triggs, 2005, with loops in float64."""
    nbins, pool, window, patch = 5, 2, 4, 4
    image = np.random.default_rng(0).random((2, 8, 12))
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="reflect")
    sobel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    gauss = np.array([[math.exp(-((i - 1.5) ** 2 + (j - 1.5) ** 2) / 2 / 2**2) for j in range(4)] for i in range(4)])
    gauss /= gauss.sum()
    cells = np.zeros((2, nbins, 4, 6))
    for c in range(2):
        for i in range(8):
            for j in range(12):
                gx, gy = (float((padded[c, i : i + 3, j : j + 3] * k).sum()) for k in (sobel, sobel.T))
                k = math.floor(math.atan2(gx, gy) / math.pi * nbins) % nbins
                cells[c, k, i // pool, j // pool] += math.hypot(gx, gy) * gauss[i % window, j % window]
    cells /= np.linalg.norm(cells, axis=1, keepdims=True)
    hog = HOGGenerator(nbins, pool, window, patch)
    targets = hog(torch.tensor(image)[None])[0]
    torch.testing.assert_close(hog.out[0], torch.tensor(cells), atol=1e-7, rtol=0)
    u = patch // pool
    for index, (row, column) in enumerate(np.ndindex(2, 3)):
        expected = cells[:, :, u * row : u * row + u, u * column : u * column + u].reshape(-1)
        torch.testing.assert_close(targets[index], torch.tensor(expected), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"patch_size": 12}, (1, 3, 48, 48), "patch_size a multiple of pool"),
        ({"pool": 0}, (1, 3, 32, 32), "pool=0, gaussian_window=16 and patch_size=16 must be positive"),
        ({}, (1, 3, 32, 40), "images have 32 x 40 pixels; patch_size=16 and gaussian_window=16 need multiples of 16"),
        ({"patch_size": 24}, (1, 3, 32, 48), "need multiples of 48"),
    ],
)
def test_hog_refuses_what_does_not_fit(options: dict[str, int], shape: tuple[int, ...], message: str) -> None:
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match=message):
            HOGGenerator(**options)(torch.zeros(shape))


def test_codes_are_chosen_by_direction() -> None:
    quantizer = CosineQuantizer(4, 2)
    quantizer.embedding.weight.data = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [0.0, -0.1]])
    z = torch.tensor([[2.0, 0.1], [0.2, 5.0], [-3.0, 0.1], [0.1, -1.0]])
    tokens = quantizer(z)
    assert tokens.tolist() == [0, 1, 2, 3]
    unit, codes = nn.functional.normalize(z), nn.functional.normalize(quantizer.embedding.weight)
    assert (codes[tokens] - unit).square().mean().item() == pytest.approx(0.00189115, abs=1e-8)
    many = torch.randn(100, 2, dtype=torch.float64)
    distances = torch.cdist(nn.functional.normalize(many), codes.double())
    assert torch.equal(quantizer(many), distances.argmin(1))
    assert quantizer(z.view(2, 2, 2)).shape == (2, 2)


def saved(tmp_path: Path, generator: nn.Module, leave_out: str = "") -> dict[str, Any]:
    weights = {name: value for name, value in generator.state_dict().items() if not leave_out or leave_out not in name}
    torch.save(weights, tmp_path / "weights.pth")
    return {"type": "Pretrained", "checkpoint": str(tmp_path / "weights.pth")}


def test_tokens_are_codes_of_what_the_encoder_sees(tmp_path: Path) -> None:
    init_cfg = saved(tmp_path, VQKD(**TINY, allow_random_weights=True))
    vqkd = MODELS.build({"type": "VQKD", **TINY, "init_cfg": init_cfg})
    vqkd.init_weights()
    images = torch.rand(2, 3, 16, 8)
    tokens = vqkd(images)
    assert (tokens.shape, tokens.dtype) == ((2, 8), torch.int64)
    z = vqkd.encode_task_layer(vqkd.encoder(images)[-1].permute(0, 2, 3, 1))
    cosines = nn.functional.cosine_similarity(z[..., None, :], vqkd.quantize.embedding.weight, dim=-1)
    assert torch.equal(tokens, cosines.argmax(-1).flatten(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert vqkd(images).dtype == torch.int64


def test_tokens_of_a_vision_transformer_have_the_known_size() -> None:
    encoder = {"type": "BEiTViT", "arch": "base", "out_type": "featmap", "use_abs_pos_emb": True}
    vqkd = VQKD({**encoder, "use_rel_pos_bias": False, "layer_scale_init_value": 0.0}, allow_random_weights=True)
    tokens = vqkd(torch.rand(2, 3, 224, 224))
    assert (tokens.shape, tokens.dtype) == ((2, 196), torch.int64)
    assert 0 <= tokens.min() <= tokens.max() < 8192


def test_the_encoder_of_dalle_has_the_known_size() -> None:
    encoder = DALLEEncoder(n_hid=8, vocab_size=50, allow_random_weights=True)
    assert encoder(torch.rand(1, 3, 112, 112)).shape == (1, 50, 14, 14)
    names = encoder.state_dict()
    assert {"blocks.input.w", "blocks.group_2.block_1.id_path.w", "blocks.output.conv.b"} < set(names)
    assert "blocks.group_1.block_1.id_path.w" not in names
    shapes = [tuple(names[f"blocks.group_4.block_1.res_path.conv_{k}.w"].shape) for k in range(1, 5)]
    assert shapes == [(16, 32, 3, 3), (16, 16, 3, 3), (16, 16, 3, 3), (64, 16, 1, 1)]
    block = encoder.blocks.group_1.block_2
    x = torch.rand(1, 8, 4, 4)
    torch.testing.assert_close(block(x), x + block.res_path(x) / 64)


def generators(tmp_path: Path) -> list[BaseTargetGenerator]:
    made: list[BaseTargetGenerator] = [HOGGenerator(patch_size=8, gaussian_window=8)]
    for kind, options in ((VQKD, TINY), (DALLEEncoder, {"n_hid": 4, "n_blk_per_group": 1, "vocab_size": 6})):
        random = kind(**options, allow_random_weights=True)
        generator = kind(**options, init_cfg=saved(tmp_path, random))
        generator.init_weights()
        made.append(generator)
    return made


def test_generators_never_move(tmp_path: Path) -> None:
    """An optimizer with weight decay, over all parameters, with each made trainable again: still nothing."""
    x = torch.rand(2, 3, 16, 16, requires_grad=True)
    for generator in generators(tmp_path):
        assert not any(parameter.requires_grad for parameter in generator.parameters())
        model = nn.ModuleDict({"generator": generator, "layer": nn.Linear(2, 2)}).train()
        assert not any(part.training for part in generator.modules())
        before = {name: value.clone() for name, value in generator.state_dict().items()}
        first = generator(x)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5)
        model.requires_grad_(True)
        targets = generator(x)
        assert not targets.requires_grad
        model["layer"](torch.rand(2, 2)).sum().backward()
        optimizer.step()
        model.train()
        assert torch.equal(generator(x), first)
        assert all(torch.equal(generator.state_dict()[name], value) for name, value in before.items())


def test_a_trained_generator_needs_its_weights(tmp_path: Path) -> None:
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match=r"VQKD makes no sense with random weights; give init_cfg=\{type: Pretrained"):
            VQKD(**TINY)
    with pytest.raises(ValueError, match="DALLEEncoder makes no sense with random weights"):
        DALLEEncoder(init_cfg={"type": "Normal"})
    vqkd = VQKD(**TINY, init_cfg=saved(tmp_path, VQKD(**TINY, allow_random_weights=True)))
    with pytest.raises(ValueError, match=r"weights of VQKD were not loaded; call init_weights\(\)"):
        vqkd(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match="has no embed_dims"):
        VQKD({"type": "torch.nn.Identity"}, allow_random_weights=True)
    tokens = VQKD({"type": TinyEncoder, "out_type": "raw"}, allow_random_weights=True)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 8\), not maps \(B, D, h, w\); set out_type='featmap'"):
        tokens(torch.rand(1, 3, 8, 8))


def test_a_file_with_half_of_the_weights_is_refused(tmp_path: Path) -> None:
    whole = VQKD(**TINY, allow_random_weights=True)
    vqkd = VQKD(**TINY, init_cfg=saved(tmp_path, whole, leave_out="encode_task"))
    with pytest.raises(
        ValueError, match=r"lacks weights of VQKD: encode_task_layer.0.bias, .* and 1 more; check the file"
    ):
        vqkd.init_weights()
    with pytest.raises(ValueError, match="lacks weights"):
        vqkd(torch.rand(1, 3, 8, 8))
    vqkd.load_state_dict({name: v for name, v in whole.state_dict().items() if "encode_task" in name}, strict=False)
    vqkd(torch.rand(1, 3, 8, 8))


def test_weights_of_a_checkpoint_of_the_whole_model_will_do(tmp_path: Path) -> None:
    whole = VQKD(**TINY, allow_random_weights=True)
    vqkd = VQKD(**TINY, init_cfg=saved(tmp_path, whole))
    checkpoint = nn.ModuleDict({"layer": nn.Linear(1, 1), "target_generator": whole}).state_dict()
    nn.ModuleDict({"layer": nn.Linear(1, 1), "target_generator": vqkd}).load_state_dict(checkpoint)
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(vqkd(x), whole(x))


def test_a_generator_of_a_user_gives_no_gradients() -> None:
    class Halves(BaseTargetGenerator):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.train()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) / 2

    assert not Halves()(torch.ones(1, 1, requires_grad=True)).requires_grad
