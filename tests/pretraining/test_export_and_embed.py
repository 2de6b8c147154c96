"""Trained models and embeddings out of checkpoints."""

import csv
import importlib.util
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from lightly.utils.io import check_embeddings
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file
from skimage import data
from torch import nn

import widefield
from tests.pretraining.tiny import TinyWrapper, assert_same, checkpoint, exported, train, write_images
from tests.slides import write_blank_slide
from tests.small_images import write_tiff
from tests.streaming.masked import masked
from widefield.images import ForegroundChoice, open_image
from widefield.pretraining import EmbeddingModel
from widefield.pretraining.checkpoint import Checkpoint
from widefield.pretraining.embed_images import LazyPixels, Look
from widefield.pretraining.embedding import StreamingArgs
from widefield.pretraining.pixels import read_pixels
from widefield.pretraining.slides import PatchArgs
from widefield.pretraining.source import Patches
from widefield.pretraining.transform_args import TransformArgs

SIDE = {"image_size": 16, "num_workers": 0, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 images of several sizes, in folders."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "b", 4, side=40)
    write_images(folder / "a", 6, side=56)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The checkpoint of a wrapper of one's own with an embedding layer."""
    out = tmp_path_factory.mktemp("run")
    train(out, images, embed_dim=6)
    return out / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """The checkpoint of a model that was given by name."""
    out = tmp_path_factory.mktemp("named")
    arguments = {"depth": 18, "base_channels": 4, "stem_channels": 4}
    train(out, images, model="widefield/ResNet", model_args=arguments)
    return out / "checkpoints" / "last.ckpt"


def test_slides_of_any_ending_are_pretrained_on_and_embedded_beside_files_that_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    (folder / "deep").mkdir(parents=True)
    names = ["a.svs", "b.scn", "c.BTF", "d.qptiff", "deep/e.tf8"]
    for k, name in enumerate(names):
        write_tiff(folder / name, data.astronaut()[64 * k : 64 * k + 200, :300])
    for name in ("a.svs.aux.xml", "b.xml", "c.tfw", "d.qptiff.ovr"):
        (folder / name).write_bytes(b"beside")
    train(tmp_path / "out", folder)
    assert not (tmp_path / "out" / "bad_images.csv").exists()
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    for size in (16, None):
        options = {**SIDE, "image_size": size, "model": TinyWrapper(), "overwrite": True}
        widefield.embed(tmp_path / "e.pt", folder, last, **options)
        assert torch.load(tmp_path / "e.pt", weights_only=True)["filenames"] == names


def test_every_patch_of_tissue_has_an_embedding(run: Path, tmp_path: Path) -> None:
    picture = np.full((150, 200, 3), 245, np.uint8)
    picture[10:60, 70:120] = data.immunohistochemistry()[:50, :50]
    (tmp_path / "slides").mkdir()
    write_tiff(tmp_path / "slides" / "a.tif", picture)
    slides = {"patch_size": 64}
    widefield.embed(tmp_path / "e.pt", tmp_path / "slides", run, model=TinyWrapper(), slides=slides, **SIDE)
    content = torch.load(tmp_path / "e.pt", weights_only=True)
    assert content["filenames"] == ["a.tif:0,64"] and content["embeddings"].shape == (1, 6)
    picture = picture[:64, 64:128]
    write_tiff(tmp_path / "cut.tif", picture)
    widefield.embed(tmp_path / "c.pt", tmp_path / "cut.tif", run, model=TinyWrapper(), **SIDE)
    assert torch.equal(torch.load(tmp_path / "c.pt", weights_only=True)["embeddings"], content["embeddings"])
    all_of_it = Patches.of(tmp_path / "slides", 3, PatchArgs(64, foreground=False))
    assert [all_of_it.name(k).partition(":")[2] for k in range(len(all_of_it))][-1] == "86,136"
    assert len(all_of_it) == 3 * 4 and all_of_it.read(11, Random(0)).shape == (3, 64, 64)
    (tmp_path / "slides" / "a.tif").write_bytes(b"II*\0")
    with pytest.raises(ValueError, match="none of the slides can be used"):
        widefield.embed(tmp_path / "f.pt", tmp_path / "slides", run, model=TinyWrapper(), slides=slides, **SIDE)


def test_maps_before_pooling_are_embeddings_of_positions(run: Path, images: Path, tmp_path: Path) -> None:
    found = {}
    for pool in (True, False):
        widefield.embed(tmp_path / f"{pool}", images, run, model=TinyWrapper(), pool=pool, **SIDE)
        found[pool] = torch.load(tmp_path / f"{pool}", weights_only=True)["embeddings"]
    assert found[False].shape == (*found[True].shape, 4, 4)
    torch.testing.assert_close(found[False].mean((2, 3)), found[True])
    with pytest.raises(ValueError, match="pool=False gives maps, and format='csv' is for vectors"):
        widefield.embed(tmp_path / "c", images, run, model=TinyWrapper(), pool=False, format="csv", **SIDE)
    Image.new("RGB", (64, 32)).save(tmp_path / "wide.png")
    sizes = [images / "a" / "00.png", tmp_path / "wide.png"]
    with pytest.raises(ValueError, match="images have maps of 6 x 14 x 14 and 6 x 8 x 16; give an image_size"):
        widefield.embed(tmp_path / "d", sizes, run, model=TinyWrapper(), pool=False, **{**SIDE, "image_size": None})


def test_an_image_that_a_model_cannot_take_loses_no_other(run: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2)
    Image.new("RGB", (1, 1)).save(tmp_path / "images" / "00a.png")

    class Choosy(TinyWrapper):
        def forward_features(self, x: torch.Tensor) -> dict[str, Any]:
            if x.shape[-1] == 1:
                raise RuntimeError("Kernel size can't be greater than actual input size")
            return super().forward_features(x)

    options = {**SIDE, "image_size": None, "model": Choosy()}
    widefield.embed(tmp_path / "e.pt", tmp_path / "images", run, **options)
    assert torch.load(tmp_path / "e.pt", weights_only=True)["filenames"] == ["00.png", "01.png"]


def trained(path: Path) -> EmbeddingModel:
    """What `train` with embed_dim=6 left at `path`, made by hand."""
    content = torch.load(path, weights_only=True)
    prefix = "method.embedding."
    embedding = EmbeddingModel(TinyWrapper(), 6)
    embedding.load_state_dict(
        {name.removeprefix(prefix): value for name, value in content["state_dict"].items() if name.startswith(prefix)}
    )
    return embedding


@pytest.mark.parametrize("part", ["model", "wrapped_model", "embedding_model"])
@pytest.mark.parametrize("format", ["torch_state_dict", "safetensors", "torch_model", "package_default"])
def test_every_part_in_every_format(part: Any, format: Any, run: Path, tmp_path: Path) -> None:
    out, embedding = tmp_path / "new" / "file", trained(run)
    expected: Any = {
        "model": embedding.wrapped_model.get_model(),
        "wrapped_model": embedding.wrapped_model,
        "embedding_model": embedding,
    }[part]
    if format == "package_default" and part != "model":
        with pytest.raises(ValueError, match=r'format="package_default" is for part="model"'):
            widefield.export(out, run, part=part, format=format)
        return
    given = [TinyWrapper()] if format == "torch_model" else [None, TinyWrapper()]
    for model in given:
        widefield.export(out, run, part=part, format=format, model=model, overwrite=True)
        if format == "torch_model":
            module = torch.load(out, weights_only=False)
            assert type(module) is type(expected)
            written = module.state_dict()
        else:
            written = load_file(out) if format == "safetensors" else torch.load(out, weights_only=True)
        if format == "safetensors":  # it sorts
            assert_same(dict(sorted(written.items())), dict(sorted(expected.state_dict().items())))
        else:
            assert_same(dict(written), dict(expected.state_dict()))


def test_a_model_that_was_given_by_name_makes_itself_anew(named: Path, tmp_path: Path, images: Path) -> None:
    widefield.export(tmp_path / "model.pt", named, format="torch_model")
    model = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same(dict(model.state_dict()), dict(exported(named.parents[1])))
    widefield.embed(tmp_path / "e.pt", images, named, **SIDE)
    assert len(torch.load(tmp_path / "e.pt", weights_only=True)["embeddings"]) == 10


def test_a_trained_model_is_opened_from_a_checkpoint_and_from_an_exported_file(named: Path, run: Path) -> None:
    opened = widefield.load_model(named)
    assert_same(dict(opened.state_dict()), dict(exported(named.parents[1])))
    file = run.parents[1] / "exported_models" / "exported_last.pt"
    of_file = widefield.load_model_from_checkpoint(file, model=TinyWrapper(seed=3))
    assert_same(dict(of_file.state_dict()), dict(exported(run.parents[1])))
    assert not opened.training and not of_file.training
    with pytest.raises(ValueError, match=r"holds weights alone: .* the checkpoint of its run is .*last.ckpt"):
        widefield.load_model(file)
    with pytest.raises(ValueError, match="of `widefield pretrain`, and its model has no classifier"):
        widefield.get_model(named)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"pytorch-lightning_version": "2.6", "state_dict": {}},
            r"get_model\(FILE\) opens it if `widefield fit` wrote it",
        ),
        (nn.Linear(1, 1), "holds a whole module: torch.load"),
    ],
)
def test_what_opens_a_file_that_is_no_checkpoint_of_pretraining_is_told(
    content: Any, message: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message):
        widefield.load_model(tmp_path / "x.ckpt")


def test_published_weights_are_not_fetched_again(tmp_path: Path, images: Path, named: Path) -> None:
    content = torch.load(named, weights_only=True)
    assert content["widefield"]["named_model"] == {
        "name": "widefield/ResNet",
        "args": {"depth": 18, "base_channels": 4, "stem_channels": 4},
    }
    from widefield.pretraining.checkpoint import named_model

    made = named_model("timm/resnet18", {"pretrained": True, "drop_rate": 0.1})
    assert made == {"name": "timm/resnet18", "args": {"drop_rate": 0.1}}
    assert named_model("timm/resnet18", {"act_layer": nn.GELU}) is None


def test_dino_exports_the_teacher_with_gradients_on(tmp_path: Path, images: Path) -> None:
    train(tmp_path / "run", images, "dino")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    widefield.export(tmp_path / "model", path, format="torch_model", model=TinyWrapper())
    model = torch.load(tmp_path / "model", weights_only=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same(dict(model.state_dict()), dict(exported(tmp_path / "run")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "modle"}, "part: got 'modle', expected one of .*; did you mean 'model'"),
        ({"part": "head"}, "part: got 'head', expected one of 'model', 'wrapped_model', 'embedding_model'"),
        ({"format": "tensorrt"}, "format: got 'tensorrt', expected one of 'package_default', 'torch_state_dict'"),
        ({"overwrite": 1}, "overwrite: got 1, expected True or False"),
        ({"format": "torch_model"}, r"holds weights and no code.*give what was trained again, as model="),
        ({"model": TinyWrapper(dim=7)}, "is not of this model"),
        ({"out": "there"}, r"there already exists! Set overwrite=True"),
        ({"out": "."}, r"is a directory; give the path of a file"),
        ({"checkpoint": "there"}, "there was not written by widefield.train"),
    ],
)
def test_what_export_refuses(options: dict[str, Any], message: str, run: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "there")
    before = (tmp_path / "there").read_bytes()
    paths = {name: tmp_path / options.pop(name) for name in ("out", "checkpoint") if name in options}
    with pytest.raises(ValueError, match=message):
        widefield.export(**{"out": tmp_path / "new", "checkpoint": run, **paths, **options})
    assert (tmp_path / "there").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_class_that_cannot_be_pickled_is_named_and_the_old_file_stays(run: Path, tmp_path: Path) -> None:
    class Local(TinyWrapper):
        pass

    (tmp_path / "old").write_text("kept")
    with pytest.raises(ValueError, match=r"the Local cannot be pickled"):
        widefield.export(
            tmp_path / "old", run, part="wrapped_model", format="torch_model", model=Local(), overwrite=True
        )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["kept"]


def by_hand(path: Path, images: Path, side: int = 16) -> torch.Tensor:
    """Embeddings of sorted images: resized, normalised with ImageNet's numbers, one at a time."""
    embedding = trained(path).eval()
    rows = []
    for file in sorted(images.rglob("*.png")):
        image = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None]
        small = nn.functional.interpolate(image.float(), (side, side), mode="bilinear", antialias=True) / 255
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        rows.append(embedding.vectors((small - mean) / std)[0].detach())
    return torch.stack(rows)


def test_embeddings_are_in_sorted_order_whatever_the_batches_and_workers(
    run: Path, images: Path, tmp_path: Path
) -> None:
    expected = by_hand(run, images)
    for k, options in enumerate([{}, {"batch_size": 3}, {"batch_size": 4, "num_workers": 2}, {"image_size": (16, 16)}]):
        widefield.embed(tmp_path / f"{k}.pt", images, run, model=TinyWrapper(seed=3), **{**SIDE, **options})
        found = torch.load(tmp_path / f"{k}.pt", weights_only=True)
        assert found["filenames"] == [f"a/{k:02d}.png" for k in range(6)] + [f"b/{k:02d}.png" for k in range(4)]
        assert found["embeddings"].dtype == torch.float32
        torch.testing.assert_close(found["embeddings"], expected, rtol=0.02, atol=0.02)  # a step of 8 bits
    widefield.embed(tmp_path / "one.pt", [images / "b" / "00.png"], run, model=TinyWrapper(), **SIDE)
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    assert one["filenames"] == [str(images / "b" / "00.png")]
    torch.testing.assert_close(one["embeddings"][0], found["embeddings"][6])


def test_no_random_number_of_the_callers_is_drawn(run: Path, images: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    widefield.embed(tmp_path / "e.pt", images, run, model=TinyWrapper(dropout=0.5), **SIDE)
    first = torch.load(tmp_path / "e.pt", weights_only=True)["embeddings"]
    model = TinyWrapper(dropout=0.5)
    state = torch.get_rng_state()
    widefield.embed(tmp_path / "e.pt", images, run, model=model, overwrite=True, **SIDE)
    assert torch.equal(state, before) and torch.equal(torch.get_rng_state(), before)
    assert torch.equal(torch.load(tmp_path / "e.pt", weights_only=True)["embeddings"], first), "dropout is off"


@pytest.mark.parametrize("format", ["csv", "lightly_csv"])
def test_tables_hold_the_same_numbers(format: Any, run: Path, images: Path, tmp_path: Path) -> None:
    for name, kind in (("e.pt", "torch"), ("e.csv", format)):
        widefield.embed(tmp_path / name, images, run, format=kind, model=TinyWrapper(), **SIDE)
    expected = torch.load(tmp_path / "e.pt", weights_only=True)
    with (tmp_path / "e.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    numbers = [f"embedding_{k}" for k in range(6)]
    if format == "csv":
        assert header == ["filename", *numbers]
    else:
        assert header == ["filenames", *numbers, "labels"] and {row.pop() for row in rows} == {"0"}
        check_embeddings(str(tmp_path / "e.csv"))
    assert [row[0] for row in rows] == expected["filenames"]
    values = torch.tensor([[float(cell) for cell in row[1:]] for row in rows])
    assert torch.equal(values, expected["embeddings"]), "every bit of a float32"


def test_parquet_files(run: Path, images: Path, tmp_path: Path) -> None:
    for name, kind in (("e.pt", "torch"), ("e.parquet", "parquet")):
        widefield.embed(tmp_path / name, images, run, format=kind, model=TinyWrapper(), **SIDE)
    expected = torch.load(tmp_path / "e.pt", weights_only=True)
    columns = parquet.read_table(tmp_path / "e.parquet").to_pydict()
    assert columns["filename"] == expected["filenames"]
    assert torch.equal(torch.tensor(columns["embedding"]), expected["embeddings"])


def test_parquet_without_pyarrow_is_refused_before_any_work(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyarrow" else found(name))
    with pytest.raises(ValueError, match=r"needs the package pyarrow, .* pip install pyarrow"):
        widefield.embed(tmp_path / "e", images, run, format="parquet", model=TinyWrapper(), **SIDE)


@pytest.mark.parametrize(("channels", "dtype"), [(3, np.uint16), (1, np.uint8), (5, np.uint16), (2, np.float32)])
def test_images_of_any_type_are_seen_as_in_the_training(channels: int, dtype: Any, tmp_path: Path) -> None:
    """The same pictures as floats from 0 to 1 and as numbers of `dtype` have the same embeddings, which differ from each other."""
    unit = np.random.default_rng(0).random((8, channels, 24, 32)) * np.linspace(0.2, 1, 8)[:, None, None, None]
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    for folder, factor, kind in (("of_type", top, dtype), ("unit", 1, np.float32)):
        (tmp_path / folder).mkdir()
        for k, picture in enumerate(unit):
            np.save(tmp_path / folder / f"{k}.npy", (picture * factor).astype(kind))
    arguments = {"num_channels": channels, "normalize": {"mean": [0.3], "std": [0.2]}}
    train(tmp_path / "run", tmp_path / "of_type", model=TinyWrapper(channels), transform_args=arguments)
    path, found = tmp_path / "run" / "checkpoints" / "last.ckpt", {}
    for folder in ("of_type", "unit"):
        model = TinyWrapper(channels)
        widefield.embed(tmp_path / folder / "e", tmp_path / folder, path, model=model, **SIDE)
        found[folder] = torch.load(tmp_path / folder / "e", weights_only=True)["embeddings"]
    torch.testing.assert_close(found["of_type"], found["unit"], atol=0.02, rtol=0.02)
    assert found["unit"].std(0).max() > 0.1
    wrapper = TinyWrapper(channels)
    wrapper.get_model().load_state_dict(exported(tmp_path / "run"))
    small = nn.functional.interpolate(torch.from_numpy(unit).float(), (16, 16), mode="bilinear", antialias=True)
    features = wrapper.eval().forward_features((small - 0.3) / 0.2)["features"].mean((2, 3))
    torch.testing.assert_close(found["unit"], features.detach(), atol=1e-4, rtol=1e-4)


def test_bad_images_have_no_row(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = write_images(tmp_path / "images", 5)
    (images / "00.png").write_bytes(b"")
    (images / "02.png").write_text("no image")
    widefield.embed(tmp_path / "e", images, run, model=TinyWrapper(), batch_size=1, **SIDE)
    found = torch.load(tmp_path / "e", weights_only=True)
    assert found["filenames"] == ["01.png", "03.png", "04.png"] and found["embeddings"].shape == (3, 6)
    assert "the file is empty" in caplog.text
    with pytest.raises(ValueError, match="none of the images can be used; the last: cannot read"):
        widefield.embed(tmp_path / "x", [images / "00.png", images / "02.png"], run, model=TinyWrapper(), **SIDE)
    assert not (tmp_path / "x").exists()


def test_half_precision(run: Path, images: Path, tmp_path: Path) -> None:
    content = checkpoint(run.parents[1])
    content["state_dict"] = {k: v.half() if v.is_floating_point() else v for k, v in content["state_dict"].items()}
    torch.save(content, tmp_path / "half.ckpt")
    found = {}
    for name, path, precision in (
        ("a", run, "32-true"),
        ("b", tmp_path / "half.ckpt", "32-true"),
        ("c", run, "bf16-mixed"),
        ("d", run, "bf16-true"),
    ):
        widefield.embed(tmp_path / name, images, path, model=TinyWrapper(), precision=precision, **SIDE)
        found[name] = torch.load(tmp_path / name, weights_only=True)["embeddings"]
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], found["a"], atol=0.05, rtol=0.05)
    with pytest.raises(ValueError, match="precision='16-true' is for GPUs"):
        widefield.embed(tmp_path / "e", images, run, model=TinyWrapper(), precision="16-true", **SIDE)


def test_of_a_pyramid_the_smallest_level_that_is_large_enough_is_read(tmp_path: Path) -> None:
    write_tiff(tmp_path / "p.tif", data.astronaut())
    whole = read_pixels(tmp_path / "p.tif", 3)
    assert whole.shape == (3, 512, 512)
    assert read_pixels(tmp_path / "p.tif", 3, lambda height, width: 2.5).shape == (3, 256, 256)
    assert read_pixels(tmp_path / "p.tif", 3, lambda height, width: 1.9).shape == (3, 512, 512)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "cvs"}, "format: got 'cvs', expected one of .*; did you mean 'csv'"),
        ({"batch_size": 0}, "batch_size: got 0, expected int, at least 1"),
        ({"num_workers": "two"}, "num_workers: got 'two', expected int, at least 0 or 'auto'"),
        ({"image_size": (16,)}, "image_size: got \\(16,\\), expected int, at least 1 or a list of 2"),
        ({"image_size": 0}, "image_size: got 0, expected int, at least 1$"),
        ({"level": 1}, r"level=1 is for image_size=None"),
        ({"image_size": None, "level": 7}, r"none of the images can be used; .*level 7 of .* does not exist"),
        ({"streaming": {"tile": 7}}, r"streaming\.tile: StreamingArgs has no argument 'tile'"),
        ({"precision": "31"}, "precision='31' cannot be used"),
        ({"accelerator": "abacus"}, "accelerator='abacus'"),
        ({"data": "nowhere"}, "data: nowhere does not exist"),
        ({"model": None}, "holds weights and no code"),
        ({"out": "."}, "is a directory"),
    ],
)
def test_what_embed_refuses(options: dict[str, Any], message: str, run: Path, images: Path, tmp_path: Path) -> None:
    given = {"out": tmp_path / options.pop("out", "e"), "data": images, "model": TinyWrapper(), **SIDE, **options}
    with pytest.raises(ValueError, match=message):
        widefield.embed(checkpoint=run, **given)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_kept_unless_it_may_be_overwritten(run: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "e").write_text("kept")
    with pytest.raises(ValueError, match=r"e already exists! Set overwrite=True to overwrite the file"):
        widefield.embed(tmp_path / "e", images, run, model=TinyWrapper(), **SIDE)
    assert (tmp_path / "e").read_text() == "kept"
    widefield.embed(tmp_path / "e", images, run, model=TinyWrapper(), overwrite=True, **SIDE)
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_datasets_are_embedded_too(run: Path, images: Path, tmp_path: Path) -> None:
    pictures = [read_pixels(path, 3) for path in sorted(images.rglob("*.png"))]
    widefield.embed(tmp_path / "e", [(picture, 0) for picture in pictures], run, model=TinyWrapper(), **SIDE)
    found = torch.load(tmp_path / "e", weights_only=True)
    assert found["filenames"][3] == "item 3 of list"
    torch.testing.assert_close(found["embeddings"], by_hand(run, images), rtol=0.02, atol=0.02)


def test_slides_as_a_whole_are_embedded_without_their_background(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_blank_slide(tmp_path / "data" / "a.tif")
    whole = {"image_size": None, "streaming": {"tile_size": 512}, "model": TinyWrapper(), "precision": "64-true"}
    found = {}
    for choice in ("auto", "none"):
        with caplog.at_level("INFO"):
            widefield.embed(tmp_path / choice, path, run, foreground=choice, **{**SIDE, **whole})
        found[choice] = torch.load(tmp_path / choice, weights_only=True)["embeddings"]
    assert "87% of its pixels are background, which is skipped" in caplog.text
    args = Checkpoint.read(run)
    model = args.embedding_model(TinyWrapper(), None).double().eval()
    pixels = LazyPixels(open_image(path), Look(args.transforms, torch.float64), "a.tif")
    pixels.leave_out_background(ForegroundChoice())
    assert pixels.background is not None
    cells, fill = torch.from_numpy(pixels.background.mask.cells)[None], torch.tensor(pixels.background.fill)
    with torch.no_grad():
        expected = masked(model, pixels.read(0, 0, 64, 4096)[None], cells, fill.double().view(3, 1, 1)).flatten(1)
    torch.testing.assert_close(found["auto"].double(), expected, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(found["auto"], found["none"], rtol=1e-3)


@pytest.mark.parametrize("wrong", [{"image_size": 16}, {"streaming": None}, {"pool": False}])
def test_a_foreground_is_refused_where_slides_are_not_embedded_as_a_whole(
    run: Path, images: Path, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    given: dict[str, Any] = {**SIDE, "image_size": None, "streaming": {"tile_size": 32}, **wrong}
    with pytest.raises(ValueError, match="foreground='otsu' is for slides as a whole"):
        widefield.embed(tmp_path / "e", images, run, model=TinyWrapper(), foreground="otsu", **given)


def test_a_model_that_takes_no_mask_embeds_slides_as_they_are(run: Path, tmp_path: Path, caplog: Any) -> None:
    class Sorting(TinyWrapper):
        def forward_pool(self, x: dict[str, Any]) -> dict[str, Any]:
            return {"pooled_features": x["features"].flatten(2).sort(-1).values[..., -1:, None]}

    path = write_blank_slide(tmp_path / "data" / "a.tif")
    given: dict[str, Any] = {**SIDE, "image_size": None, "streaming": {"tile_size": 512}, "model": Sorting()}
    with caplog.at_level("INFO"):
        widefield.embed(tmp_path / "auto", path, run, **given)
    assert "background is not left out: a mask needs a network that is streamed as a whole" in caplog.text
    with pytest.raises(ValueError, match="streamed as a whole"):
        widefield.embed(tmp_path / "otsu", path, run, foreground="otsu", **given)


def test_images_at_their_own_size_are_streamed_to_the_same_embeddings(run: Path, images: Path, tmp_path: Path) -> None:
    """Of several formats, sizes and types, a dataset's too. Files have float32; below them float64 is equal up to rounding."""
    (tmp_path / "data").mkdir()
    astronaut = data.astronaut()
    write_tiff(tmp_path / "data" / "a.tif", astronaut[:120, :128])
    Image.fromarray(astronaut[:100, :90]).save(tmp_path / "data" / "b.bmp")
    Image.fromarray(astronaut[:100, :90, 0]).save(tmp_path / "data" / "c.png")
    np.save(tmp_path / "data" / "d.npy", astronaut[:100, :90].astype(np.uint16) * 257)
    (tmp_path / "data" / "e.tif").write_bytes(b"II*\0no image")
    common: dict[str, Any] = {**SIDE, "image_size": None, "model": TinyWrapper(), "precision": "64-true"}
    found = {}
    for name, streaming in (("whole", None), ("tiles", {"tile_size": 32})):
        widefield.embed(tmp_path / name, tmp_path / "data", run, streaming=streaming, **common)
        found[name] = torch.load(tmp_path / name, weights_only=True)
        assert found[name]["filenames"] == ["a.tif", "b.bmp", "c.png", "d.npy"]
    torch.testing.assert_close(found["tiles"]["embeddings"], found["whole"]["embeddings"], rtol=1e-6, atol=1e-7)
    items = [read_pixels(path, 3) for path in sorted((tmp_path / "data").iterdir())[:4]]
    widefield.embed(tmp_path / "items", items, run, streaming={"tile_size": 32}, **common)
    of_items = torch.load(tmp_path / "items", weights_only=True)["embeddings"]
    torch.testing.assert_close(of_items, found["whole"]["embeddings"], rtol=1e-6, atol=1e-7)
    look = Look(TransformArgs(), torch.float64)
    pixels = LazyPixels(open_image(tmp_path / "data" / "a.tif"), look, "a.tif")
    plain = TinyWrapper().double().eval()
    whole = EmbeddingModel(plain).vectors(pixels.read(0, 0, 120, 128)[None])
    tiles = EmbeddingModel(plain, None, StreamingArgs(32)).vectors(pixels)
    torch.testing.assert_close(tiles, whole, rtol=1e-12, atol=1e-14)
    small = {**common, "image_size": (100, 90)}
    widefield.embed(tmp_path / "small", tmp_path / "data", run, streaming={"tile_size": 32}, **small)
    resized = torch.load(tmp_path / "small", weights_only=True)["embeddings"]
    torch.testing.assert_close(resized[3], found["whole"]["embeddings"][3], rtol=1e-4, atol=1e-5)
