"""`widefield fit --model patches:...`: an encoder of patches and a head, trained together on slides, exported, cached."""

from pathlib import Path

import numpy as np
import peft
import pytest
import pyvips
import timm
import torch
import zarr
from safetensors.torch import load_file

import widefield
from widefield.cli import main
from widefield.data import LabelledImages
from widefield.images import open_image
from widefield.images.feature_files import read_features
from widefield.models import Classifier

SIDE = 32
PATCHES = ["--model", "patches:timm/test_vit", "--patch-size", str(SIDE), "--spacing", "0.5", "--foreground", "otsu"]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides of 160 x 224 pixels of 0.5 micrometres: glass, and stained tissue, which is darker in class b."""
    folder = tmp_path_factory.mktemp("slides")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    rows = ["image,label,split"]
    for k in range(6):
        pixels = np.full((160, 224, 3), 240, np.uint8)
        pixels[32:128, 64:192] = [200, 90, 160] if k % 2 else [150, 30, 110]
        pixels[32:128, 64:192] += generator.integers(0, 30, (96, 128, 3), dtype=np.uint8)
        image = pyvips.Image.new_from_array(pixels)
        image.tiffsave(
            str(folder / "images" / f"s{k}.tif"), tile=True, tile_width=64, tile_height=64, xres=2000, yres=2000
        )
        rows.append(f"s{k},{'ab'[k % 2]},{'train' if k < 4 else 'val'}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


def fit(slides: Path, out: Path, *more: str) -> int:
    data = ["--images", str(slides / "images"), "--labels", str(slides / "labels.csv"), "--out", str(out)]
    return main(["fit", *data, *PATCHES, "--epochs", "2", "--memory-budget", "64MiB", *more])


@pytest.fixture(scope="module")
def run(slides: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "lora"
    assert fit(slides, out, "--pooling", "abmil", "--lora", "4", "--lr", "0.01") == 0
    return out


def test_adapters_and_head_train_and_the_encoder_stays(run: Path) -> None:
    torch.manual_seed(0)
    model, checkpoint = Classifier.from_checkpoint(run / "best.ckpt")
    assert checkpoint["hyper_parameters"]["lora"] == 4
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    adapted = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert adapted
    assert all(value.any() for value in adapted)


def test_the_gradients_are_those_of_plain_pytorch_on_all_patches_at_once(run: Path, slides: Path) -> None:
    model, _ = Classifier.from_checkpoint(run / "best.ckpt", memory_budget="64MiB")
    model.double().train()
    data = LabelledImages(slides / "images", slides / "labels.csv", spacing=0.5, foreground="otsu")
    image, label = data.train_set[0]
    target = torch.tensor([label])
    model.output_and_loss([image], target, "train")[1].backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    pixels = torch.from_numpy(image.read(0, 0, *image.shape[1:]))[None]
    cells = torch.from_numpy(image.background.mask.cells)[None, None].double()
    blank = torch.nn.functional.adaptive_max_pool2d(cells, image.shape[1:]) == 0
    mask = torch.nn.functional.adaptive_max_pool2d(cells, (5, 7))[:, 0] > 0
    assert 0 < int(mask.sum()) < 35
    pixels = torch.where(blank, torch.tensor(image.background.fill, dtype=torch.uint8)[:, None, None], pixels)
    whole = model.stream_network.normalisation.unchecked(pixels, torch.float64)
    patches = whole.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE).permute(0, 2, 3, 1, 4, 5)[mask]
    size, config = model.encoder.patch_embed.img_size, model.encoder.pretrained_cfg
    patches = torch.nn.functional.interpolate(patches, size, mode=config["interpolation"], antialias=True)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    vectors = torch.zeros(1, 5, 7, model.encoder.num_features, dtype=torch.float64)
    encoded = model.encoder((patches - mean.double()) / std.double())
    fmap = vectors.masked_scatter(mask[..., None], encoded).permute(0, 3, 1, 2)
    torch.nn.functional.cross_entropy(model.head(fmap, mask), target).backward()
    for name, value in model.named_parameters():
        if value.requires_grad:
            error = (found[name] - value.grad).abs().max() / value.grad.abs().max().clamp_min(1e-30)
            assert error < 1e-10, name


def test_a_run_predicts_with_heatmaps_and_validates(
    run: Path, slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(slides / "images" / "s4.tif")
    assert main(["predict", "--checkpoint", str(run / "best.ckpt"), "--out", str(tmp_path), image]) == 0
    assert (tmp_path / "s4.tif.png").is_file()
    row = (tmp_path / "predictions.csv").read_text().splitlines()[1].split(",")
    assert float(row[10]) > 0.3  # skipped
    capsys.readouterr()
    assert main(["validate", "--run", str(run)]) == 0
    assert "val_loss" in capsys.readouterr().out


def test_adapters_are_exported_alone_and_merged(run: Path, tmp_path: Path) -> None:
    checkpoint = str(run / "best.ckpt")
    model, _ = Classifier.from_checkpoint(checkpoint)
    patches = torch.rand(2, 3, 160, 160)
    expected = model.encoder.eval()(patches)

    merged_file = str(tmp_path / "merged.safetensors")
    assert main(["export", "--checkpoint", checkpoint, "--out", merged_file, "--format", "safetensors"]) == 0
    net = timm.create_model("test_vit", num_classes=0).eval()
    net.load_state_dict(load_file(merged_file))
    torch.testing.assert_close(net(patches), expected, rtol=1e-4, atol=1e-5)

    folder = tmp_path / "adapters"
    assert main(["export", "--checkpoint", checkpoint, "--out", str(folder), "--part", "adapters"]) == 0
    plain = timm.create_model("test_vit", num_classes=0).eval()
    own = {name.replace(".base_layer", ""): value for name, value in model.encoder.state_dict().items()}
    plain.load_state_dict({name: value for name, value in own.items() if "lora_" not in name})
    assert not torch.allclose(plain(patches), expected, atol=1e-4)
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(plain, str(folder)).eval()(patches), expected, rtol=1e-4, atol=1e-5
    )


def test_a_misspelt_encoder_is_told_before_anything_is_read(
    slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(slides, tmp_path / "run", "--model", "patches:timm/vit_smal_patch16_224") == 2
    assert "did you mean patches:timm/vit_small_patch16_224" in capsys.readouterr().err


def test_what_has_no_adapters_exports_none(
    slides: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(run / "best.ckpt")
    out = str(tmp_path / "out.pt")
    assert (
        main(
            [
                "export",
                "--checkpoint",
                checkpoint,
                "--out",
                out,
                "--part",
                "wrapped_model",
                "--format",
                "torch_state_dict",
            ]
        )
        == 2
    )
    assert "is of `widefield pretrain`" in capsys.readouterr().err


def test_the_maps_of_a_frozen_encoder_are_computed_once(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    plain = widefield.StreamingModule.trunk_map
    monkeypatch.setattr(
        widefield.modules.BaseModule, "trunk_map", lambda self, image: computed.append(image.path) or plain(self, image)
    )
    flags = ("--pooling", "clam", "--cache-features", "model.train_streaming_layers=false")
    assert fit(slides, tmp_path / "run", *flags) == 0
    # the first is to see whether the network takes masks, and is not kept
    assert sorted(path.name for path in computed[1:]) == [f"s{k}.tif" for k in range(6)]
    kept = sorted((tmp_path / "run" / "features").iterdir())
    assert len(kept) == 6

    model, _ = Classifier.from_checkpoint(tmp_path / "run" / "best.ckpt")
    model.eval()
    data = LabelledImages(slides / "images", slides / "labels.csv", spacing=0.5, foreground="otsu")
    image, _ = data.train_set[0]
    with torch.no_grad():
        fmap = model.trunk_map(image)
    assert np.allclose(np.asarray(zarr.open_array(kept[0], mode="r")[:]), fmap.numpy(), rtol=1e-4, atol=1e-5)

    computed.clear()
    assert main(["validate", "--run", str(tmp_path / "run")]) == 0
    assert computed == []
    assert fit(slides, tmp_path / "run", "--resume", *flags, "--epochs", "3") == 0
    assert len(computed) == 1
    computed.clear()
    assert main(["validate", "--run", str(tmp_path / "run"), "data.spacing=0.6"]) == 0
    assert sorted(path.name for path in computed) == ["s4.tif", "s5.tif"]


@pytest.mark.slow
def test_other_weights_have_other_maps(slides: Path, tmp_path: Path) -> None:
    from widefield.models.feature_cache import FeatureCache

    image = open_image(slides / "images" / "s0.tif", spacing=0.5)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = Classifier(
            PATCHES[1], ["a", "b"], patch_size=SIDE, train_streaming_layers=False, cache_features=True
        ).eval()
        model.feature_cache = FeatureCache(tmp_path)
        found.append(model.trunk_map(image))
        assert torch.equal(model.trunk_map(image), found[-1])
        with torch.no_grad():
            next(model.encoder.parameters()).add_(1)
        assert not torch.equal(model.trunk_map(image), found[-1])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("format", ["hdf5", pytest.param("zarr", marks=pytest.mark.slow)])
def test_features_of_patches_are_written_with_their_places_and_train_a_head(
    format: str, run: Path, slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["embed", "--patches", "--data", str(slides / "images"), "--out", str(tmp_path / "features")]
    assert main([*call, "--checkpoint", str(run / "best.ckpt"), f"format={format}"]) == 0
    model, _ = Classifier.from_checkpoint(run / "best.ckpt")
    model.eval()
    data = LabelledImages(slides / "images", slides / "labels.csv", spacing=0.5, foreground="otsu")
    image, _ = data.train_set[0]
    with torch.no_grad():
        fmap = model.trunk_map(image)[0]
    files = sorted((tmp_path / "features").iterdir())
    assert [path.stem for path in files] == [f"s{k}" for k in range(6)]
    found = read_features(files[0])
    assert {name: int(found.attributes[name]) for name in ("patch_size", "patch_size_level0", "level0_width")} == {
        "patch_size": SIDE,
        "patch_size_level0": SIDE,
        "level0_width": 224,
    }
    for (x, y), features in zip(found.coords, found.features, strict=True):
        torch.testing.assert_close(torch.from_numpy(features), fmap[:, y // SIDE, x // SIDE], rtol=1e-4, atol=1e-5)
    assert len(found.features) == int(fmap.any(0).sum())
    flags = ["--labels", str(slides / "labels.csv"), "--pooling", "mean", "--epochs", "1"]
    assert main(["fit", "--features", str(tmp_path / "features"), *flags, "--out", str(tmp_path / "run")]) == 0
    if format == "hdf5":
        capsys.readouterr()
        before = files[0].stat().st_mtime_ns
        assert main([*call, "--model", "patches:timm/test_vit"]) == 0  # all are there
        assert files[0].stat().st_mtime_ns == before
        assert main([*call, "--model", "timm/test_vit"]) == 2
        assert "must be patches:timm/NAME" in capsys.readouterr().err
        assert main([*call, "--batch-size", "3"]) == 2
        assert "--batch-size does not go with embed --patches" in capsys.readouterr().err


def test_places_of_patches_are_those_of_the_largest_level(slides: Path, tmp_path: Path) -> None:
    image = str(slides / "images" / "s1.tif")
    call = ["embed", "--patches", "--data", image, "--out", str(tmp_path), "--model", "patches:timm/test_vit"]
    assert main([*call, "--spacing", "1", "patch_size=32", "--foreground", "none"]) == 0
    found = read_features(tmp_path / "s1.h5")
    assert found.coords.tolist() == [[x, y] for y in (0, 64) for x in (0, 64, 128)]
    assert int(found.attributes["patch_size_level0"]) == 64
