"""What tells the user that a run works."""

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from PIL import Image
from torch import Tensor, nn

from tests.pretraining.tiny import TinyWrapper, assert_same, exported, losses, metrics, train, write_images
from widefield.pretraining import METHODS, Method
from widefield.pretraining.labels import labels_of
from widefield.pretraining.quality import effective_rank, knn_accuracy, nearest, spread
from widefield.pretraining.source import Items, make_source
from widefield.reports.pretraining import pca

NUMBERS = ("effective_rank", "embedding_spread", "knn_accuracy")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 images in folders of classes."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder / "a", 5)
    write_images(folder / "b", 5, side=40)
    return folder


def logged(out: Path, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics(out) if name in line]


def test_effective_rank_is_the_number_of_directions_that_are_used() -> None:
    assert effective_rank(torch.eye(8)) == pytest.approx(8)
    assert effective_rank(torch.ones(8, 5)) == pytest.approx(1, abs=1e-4)
    two = torch.zeros(6, 4)
    two[:3, 0] = two[3:, 1] = 2.0
    assert effective_rank(two) == pytest.approx(2)
    shares = torch.tensor([0.75, 0.25])
    assert effective_rank(torch.diag(shares)) == pytest.approx(math.exp(-(shares * shares.log()).sum()))
    assert effective_rank(torch.zeros(4, 3)) == 1


def test_spread_falls_from_one_to_nought() -> None:
    generator = torch.Generator().manual_seed(0)
    independent = torch.randn(200, 300, generator=generator)
    assert spread(independent) == pytest.approx(1, abs=0.01)
    assert spread(100 + 0.01 * independent) < 1e-3
    assert spread(torch.cat([torch.eye(2)[:1], -torch.eye(2)[:1]])) == 1


def test_neighbours_vote_for_their_label_and_none_for_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = ["x", "y", "z"] * 10
    apart = torch.eye(3).repeat(10, 1) + 0.1 * torch.randn(30, 3, generator=generator)
    assert knn_accuracy(apart, labels) == 1
    assert knn_accuracy(torch.randn(30, 50, generator=generator), labels) < 0.7
    assert knn_accuracy(torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), ["x", "y", "x", "y"]) == 0
    assert nearest(torch.tensor([[1.0, 0], [1, 0.3], [1, 0.1]]), 2)[1].tolist() == [[2, 1], [2, 0], [0, 1]]


def test_folders_are_classes_if_all_images_lie_in_them(images: Path, tmp_path: Path) -> None:
    source = make_source(images, 3, None, None)
    assert labels_of(source, images, None) == ("a",) * 5 + ("b",) * 5
    assert labels_of(make_source(images / "a", 3, None, None), images / "a", None) is None
    assert labels_of(make_source([images], 3, None, None), [images], None) is None
    for k in range(3):
        write_images(tmp_path / f"patient{k}", 1)
    assert labels_of(make_source(tmp_path, 3, None, None), tmp_path, None) is None, "a folder for each image"
    write_images(tmp_path, 4)
    assert labels_of(make_source(tmp_path, 3, None, None), tmp_path, None) is None


def test_labels_of_a_table_and_of_a_dataset(images: Path, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    source = make_source(images, 3, None, None)
    table.write_text("image,label\na/00.png,cat\nb/03.png,dog\nb/04.png,\n")
    assert labels_of(source, images, table) == ("cat", *[None] * 7, "dog", None)
    for text, message in (
        ("file,kind\na,b\n", "callbacks.quality.labels: .* has no column 'label'; its columns are file, kind"),
        ("image,label\na/00.png,cat\n99.png,dog\n", "has labels of 1 of the 10 images, and two classes are needed"),
    ):
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            labels_of(source, images, table)
    with pytest.raises(ValueError, match=r"callbacks\.quality\.labels: nowhere\.csv does not exist"):
        train(tmp_path / "out", images, callbacks={"quality": {"labels": "nowhere.csv"}})
    assert not (tmp_path / "out").exists()

    class WithTargets(list):
        targets = torch.tensor([3, 1])

    assert labels_of(Items(WithTargets([0, 0]), 3), None, None) == ("3", "1")
    assert labels_of(Items([0, 0], 3), None, None) is None


def test_quality_is_logged_at_the_start_now_and_then_and_at_the_end(images: Path, tmp_path: Path) -> None:
    train(tmp_path / "folders", images, epochs=11)
    for name in NUMBERS:
        assert [step for step, _ in logged(tmp_path / "folders", name)] == [0, 19, 21], name
        assert all(math.isfinite(value) for _, value in logged(tmp_path / "folders", name))
    train(tmp_path / "flat", images / "a", epochs=1, batch_size=2)
    assert [step for step, _ in logged(tmp_path / "flat", "effective_rank")] == [0, 1]
    assert not logged(tmp_path / "flat", "knn_accuracy")
    train(tmp_path / "folders", images, epochs=12, resume_interrupted=True)
    assert [step for step, _ in logged(tmp_path / "folders", "knn_accuracy")] == [0, 19, 21, 23]


def test_accuracy_tells_what_can_be_told_apart(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for k in range(16):
        value = 60 if k % 2 else 200
        pixels = generator.normal(value, 10, (24, 24, 3)).clip(0, 255).astype(np.uint8)
        path = tmp_path / "images" / ("dark" if k % 2 else "light") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    table = tmp_path / "noise.csv"
    labels = "".join(f"{'dark' if k % 2 else 'light'}/{k}.png,{'x' if k % 4 < 2 else 'y'}\n" for k in range(16))
    table.write_text("image,label\n" + labels)
    train(tmp_path / "classes", tmp_path / "images")
    train(tmp_path / "noise", tmp_path / "images", callbacks={"quality": {"labels": table}})
    assert logged(tmp_path / "classes", "knn_accuracy")[0][1] == 1
    assert logged(tmp_path / "noise", "knn_accuracy")[0][1] < 0.9


@pytest.mark.parametrize("method", ["simclr", "dino"])
def test_looking_on_changes_no_number_of_the_run(method: str, images: Path, tmp_path: Path) -> None:
    class Random(TinyWrapper):
        """Draws from all generators, while it is watched too."""

        def forward_features(self, x: Tensor) -> dict[str, Any]:
            noise = torch.rand(1) + np.random.rand() + random.random()
            return {"features": super().forward_features(x)["features"] + noise.to(x)}

    for name, callbacks in (("on", {"quality": {}, "report": {}}), ("off", {"quality": None})):
        train(tmp_path / name, images, method, epochs=2, callbacks=callbacks, model=Random(dropout=0.5))
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    assert_same(dict(exported(tmp_path / "on")), dict(exported(tmp_path / "off")))
    assert not logged(tmp_path / "off", "effective_rank")


def test_a_collapse_is_told_once(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Constant(TinyWrapper):
        def forward_pool(self, x: dict[str, Any]) -> dict[str, Any]:
            pooled = super().forward_pool(x)["pooled_features"]
            return {"pooled_features": 1 + 0 * pooled if not self.training else pooled}

    train(tmp_path / "out", images, epochs=11, model=Constant())
    assert (
        len(
            re.findall(
                "the embeddings have collapsed: .* an effective rank of 1.00 and a spread of 0.0000", caplog.text
            )
        )
        == 1
    )
    caplog.clear()
    train(tmp_path / "healthy", images)
    assert "collapsed" not in caplog.text


def test_a_model_that_cannot_be_watched_trains_all_the_same(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fixed(TinyWrapper):
        def forward_features(self, x: Tensor) -> dict[str, Any]:
            if len(x) > 8:
                raise RuntimeError("never so many")
            return super().forward_features(x)

    train(tmp_path / "out", images, model=Fixed())
    assert "quality is not measured" in caplog.text and "never so many" in caplog.text
    assert len(losses(tmp_path / "out")) == 1


def test_bad_images_are_left_out(images: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", 8)
    (folder / "03.png").write_bytes(b"")
    train(tmp_path / "out", folder)
    assert logged(tmp_path / "out", "effective_rank")


def test_a_run_draws_its_views_and_writes_a_page(tmp_path: Path, images: Path) -> None:
    """With the report, which the other tests turn off, a run writes two files more than those that `test_train` lists."""
    train(tmp_path, images, "dino", epochs=2, callbacks={"report": {}}, loggers={"tensorboard": None})
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {
        "augmented_views.png",
        "checkpoints/epoch=1-step=4.ckpt",
        "checkpoints/last.ckpt",
        "config.yaml",
        "exported_models/exported_last.pt",
        "metrics.jsonl",
        "report.html",
        "train.log",
    }
    with Image.open(tmp_path / "augmented_views.png") as views:
        assert views.size == (4 * 116 + 4, 8 * 116 + 4), "2 global and 2 local views of 8 images"
    page = (tmp_path / "report.html").read_text()
    shown = ("loss", "learning rate", "k-nearest-neighbour accuracy", "Nearest neighbours", "PCA of 10 images")
    assert all(text in page for text in shown)
    assert "t-SNE of 10 images" in page and (page.count("<img"), page.count("<svg")) == (4, 6)
    train(tmp_path, images, overwrite=True)
    assert not (tmp_path / "report.html").exists() and not (tmp_path / "augmented_views.png").exists()


def test_tensorboard_gets_the_picture_of_the_views(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {}

    class Stub(Logger):
        """In the place of Lightning's logger, which needs TensorBoard."""

        def __init__(self, **options: Any) -> None:
            super().__init__()
            assert options == {"save_dir": tmp_path, "name": "", "version": "", "prefix": "p"}
            self.experiment = self

        name = version = "stub"

        def log_metrics(self, *args: Any, **options: Any) -> None: ...
        def log_hyperparams(self, *args: Any, **options: Any) -> None: ...
        def add_image(self, tag: str, pixels: Any, step: int) -> None:
            shown[tag, step] = pixels.permute(1, 2, 0).numpy()

    monkeypatch.setattr("widefield.pretraining.loggers.TensorBoard", Stub)
    train(tmp_path, images, callbacks={"report": {}, "quality": None}, loggers={"tensorboard": {"prefix": "p"}})
    with Image.open(tmp_path / "augmented_views.png") as views:
        assert (shown["augmented_views", 0] == np.array(views)).all()


def test_a_page_that_cannot_be_drawn_costs_nothing_else(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise ImportError("no font")

    monkeypatch.setattr("widefield.reports.pretraining.write_pretraining_page", fails)
    train(tmp_path, images, epochs=3, callbacks={"report": {}, "model_export": {"every_n_epochs": 2}})
    assert "the report could not be written: ImportError: no font" in caplog.text
    assert exported(tmp_path) and "training completed" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (5, np.uint16), (2, np.float32)])
def test_images_of_any_type_are_drawn(channels: int, dtype: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    pictures = [(generator.random((channels, 24, 32)) * top).astype(dtype) for _ in range(4)]
    data = [torch.from_numpy(picture) for picture in pictures]
    options = {"callbacks": {"report": {}}, "loggers": {"jsonl": None, "tensorboard": None}}
    train(tmp_path, data, model=TinyWrapper(channels), transform_args={"num_channels": channels}, **options)
    assert (tmp_path / "report.html").exists()


def test_principal_components_keep_the_distances_of_what_lies_in_a_plane() -> None:
    generator = np.random.default_rng(0)
    plane = generator.normal(size=(20, 2)) @ generator.normal(size=(2, 7)) + 5
    points = pca(plane)
    before, after = (np.linalg.norm(rows[:, None] - rows, axis=-1) for rows in (plane, points))
    np.testing.assert_allclose(after, before, atol=1e-9)
    assert pca(np.ones((5, 1))).shape == (5, 2)


def test_the_progress_bar_shows_loss_rate_speed_and_wait(images: Path, tmp_path: Path, capsys: Any) -> None:
    train(tmp_path, images, trainer_args={"enable_progress_bar": True})
    shown = capsys.readouterr()
    bar = " ".join((shown.out + shown.err).split())
    assert all(re.search(rf" {name}: \d", bar) for name in ("train_loss", "images_per_second", "data_wait"))
    (rate,) = {float(found) for found in re.findall(r" lr: (\S+) ", bar)}
    assert 0 < rate == pytest.approx(logged(tmp_path, "lr-SGD/params")[-1][1], rel=1e-3)


def test_a_method_whose_loss_says_nothing_is_watched_too(images: Path, tmp_path: Path) -> None:
    @METHODS.register_module("test_zero", force=True)
    class Zero(Method):
        def __init__(self, embedding: Any, run: Any) -> None:
            super().__init__(embedding, run)
            self.extra = nn.Parameter(torch.zeros(1))

        def loss(self, views: Any, step: int) -> dict[str, Any]:
            return {"loss": self.extra.sum() + 0 * self.embedding.vectors(views[0]).sum()}

    train(tmp_path, images, "test_zero")
    (_, before), (_, after) = logged(tmp_path, "knn_accuracy")
    assert 0 <= before <= 1 and 0 <= after <= 1
