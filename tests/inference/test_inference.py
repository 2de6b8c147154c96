"""Models by name, and what they say of images."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage import data, io
from torch import nn

import widefield
from tests.inference.small_runs import CLASSIFIER, cifar_config, write_run
from tests.small_images import write_tiff
from widefield.config import Config
from widefield.images import open_image
from widefield.inference import AveragedViews, info_of, predict_samples
from widefield.inference.averaged_views import LazyView
from widefield.inference.models import ModelInfo
from widefield.models import Classifier
from widefield.registry import MODELS

CONVNEXT = {
    **CLASSIFIER,
    "backbone": {
        "type": "ConvNeXt",
        "arch": {"depths": [1, 1, 1, 1], "channels": [4, 4, 4, 8]},
        "gap_before_final_norm": False,
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar")
    return write_run(folder, cifar_config(folder))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        io.imsave(folder / f"{name}.png", getattr(data, name)()[100:164, 100:180], check_contrast=False)
    return folder


def test_names_are_on_the_root() -> None:
    assert widefield.MODELS is widefield.registry.MODELS is MODELS
    for name in ("get_model", "list_models", "inference_model", "ImageRetrievalInferencer", "FeatureExtractor"):
        assert callable(getattr(widefield, name))


def test_scores_without_a_class_have_numbers_for_names() -> None:
    assert ModelInfo(("cat", "dog")).names(4) == ("cat", "dog", "2", "3")
    assert ModelInfo().names(2) == ("0", "1")


def test_models_are_listed_by_patterns() -> None:
    assert "resnet18_cifar" in widefield.list_models()
    assert widefield.list_models("resnet18_w*") == ["resnet18_w8", "resnet18_w16", "resnet18_w32"]
    assert set(widefield.list_models("timm/convnext_a*")) == {
        name for name in widefield.list_models("convnext_a*") if name.startswith("timm/")
    }
    assert "timm/resnet18" not in widefield.list_models("resnet18", exclude=["timm/*"])


def test_a_model_of_a_configuration_takes_overrides() -> None:
    small = {"base_channels": 2, "stem_channels": 4}
    model = widefield.get_model("resnet18_cifar", backbone={**small, "out_indices": [0, 3]}, head={"in_channels": 16})
    assert not model.training
    assert [tuple(one.shape[1:]) for one in model.backbone(torch.rand(1, 3, 32, 32))] == [(2, 32, 32), (16, 4, 4)]
    described = widefield.get_model(CLASSIFIER, head={"num_classes": 5})
    assert described(torch.rand(1, 3, 32, 32)).shape == (1, 5)
    assert widefield.get_model(Config({"model": CLASSIFIER})).head.num_classes == 2
    assert widefield.get_model("torchvision/resnet18", num_classes=3).fc.out_features == 3
    assert widefield.get_model("timm/convnext_atto", num_classes=3).head.fc.out_features == 3
    assert isinstance(widefield.get_model("resnet18_w8"), nn.Module)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no model 'resnet18_cifa'; did you mean resnet18_cifar"):
        widefield.get_model("resnet18_cifa")
    with pytest.raises(ValueError, match="no argument 'dept'; did you mean depth"):
        widefield.get_model("resnet18_cifar", backbone={"dept": 34})
    with pytest.raises(ValueError, match="there are no published weights for this configuration"):
        widefield.get_model("resnet18_cifar", pretrained=True)
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt does not exist"):
        widefield.get_model("gone.ckpt")


def test_a_run_brings_its_weights_and_class_names(run: Path, tmp_path: Path) -> None:
    weights = torch.load(run / "best.ckpt", weights_only=True)["state_dict"]
    for name in (run, run / "best.ckpt", str(run)):
        model = widefield.get_model(name)
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        assert info_of(model).class_names == ("airplane", "automobile")
    described = widefield.get_model(run / "config.yaml", pretrained=run / "best.ckpt")
    assert torch.equal(described.head.fc.weight, weights["head.fc.weight"])
    (tmp_path / "alone.ckpt").write_bytes((run / "best.ckpt").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"config\.yaml does not exist, and .* does not say what its model is"):
        widefield.get_model(tmp_path / "alone.ckpt")
    with pytest.raises(ValueError, match="is no checkpoint of this model"):
        widefield.get_model(run, head={"num_classes": 3})


def test_pictures_show_what_is_predicted(run: Path, photos: Path, tmp_path: Path) -> None:
    inferencer = widefield.ImageClassificationInferencer(run)
    file = photos / "coffee.png"
    inferencer([file, file], show_dir=tmp_path / "shown")
    shown = {path.name: io.imread(path) for path in (tmp_path / "shown").iterdir()}
    assert shown.keys() == {"coffee.png", "1_coffee.png"}
    assert np.ptp(shown["coffee.png"][:50, :, :3]) > 200  # black letters on white


def test_files_arrays_and_tensors_are_classified_alike(run: Path, photos: Path) -> None:
    inferencer = widefield.ImageClassificationInferencer(run)
    file = photos / "coffee.png"
    pixels = io.imread(file)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    results = inferencer([file, pixels, tensor, open_image(file)], batch_size=4)
    expected = inferencer.model(tensor[None] / 255).softmax(1)[0].detach()
    for result in results:
        np.testing.assert_allclose(result["pred_scores"], expected, atol=1e-5)
        assert result["pred_label"] == int(expected.argmax())
        assert result["pred_score"] == pytest.approx(float(expected.max()), abs=1e-5)
        assert result["pred_class"] == ("airplane", "automobile")[result["pred_label"]]
    (single,) = widefield.ImageClassificationInferencer(inferencer.model, classes=["a", "b"])(str(file))
    assert single["pred_class"] in ("a", "b")
    assert widefield.inference_model(run, file)["pred_label"] == results[0]["pred_label"]
    with pytest.raises(ValueError, match="Linear predicts nothing"):
        widefield.inference_model(nn.Linear(3, 3), pixels)
    with pytest.raises(ValueError, match=r"a tensor of shape \(1, 3, 64, 80\) is no image"):
        inferencer(tensor[None])
    with pytest.raises(ValueError, match="object is no image"):
        inferencer(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size=0 must be positive"):
        inferencer(file, batch_size=0)
    with pytest.raises(ValueError, match="classes has 1 names, and the model 2 classes"):
        widefield.ImageClassificationInferencer(inferencer.model, classes=["a"])


def test_large_images_are_read_tile_by_tile_where_the_backbone_streams(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (300, 260, 3), dtype=np.uint8)
    write_tiff(tmp_path / "slide.tif", pixels)
    torch.manual_seed(0)
    streamed = widefield.get_model(CONVNEXT, backbone={"streaming": {"tile_size": 64}})
    plain = widefield.get_model(CONVNEXT)
    plain.load_state_dict(streamed.state_dict())
    image = open_image(tmp_path / "slide.tif")
    regions: list[int] = []
    read = image.read
    image.read = lambda *region: (regions.append(region[2] * region[3]), read(*region))[1]  # type: ignore[method-assign]
    views = AveragedViews(hflip=True, vflip=True, crop=200)
    for averaged in (None, views):
        by_tiles = widefield.ImageClassificationInferencer(streamed, views=averaged)(image)[0]
        whole = widefield.ImageClassificationInferencer(plain, views=averaged)(pixels)[0]
        np.testing.assert_allclose(by_tiles["pred_scores"], whole["pred_scores"], atol=1e-5)
    assert max(regions) < 300 * 260 / 2
    features = widefield.FeatureExtractor(streamed)(image, stage="backbone")[0]
    torch.testing.assert_close(features, widefield.FeatureExtractor(plain)(pixels)[0], atol=1e-4, rtol=1e-3)


def test_views_of_lazy_images_are_those_of_tensors(photos: Path) -> None:
    lazy = open_image(photos / "rocket.png")
    tensor = torch.from_numpy(lazy.read(0, 0, 64, 80))
    views = AveragedViews.parse("hflip, vflip, crop=30")
    assert views == AveragedViews(True, True, 30)
    found, expected = views.of(lazy), views.of(tensor)
    assert len(found) == len(expected) == 4 * 5
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.read(0, 0, 30, 30), other)
        np.testing.assert_array_equal(one.read(3, 5, 7, 11), other[:, 3:10, 5:16])
    np.testing.assert_array_equal(expected[5][:, :, 0], tensor[:, :30, 29])
    assert isinstance(AveragedViews(hflip=True).of(lazy)[1], LazyView)
    with pytest.raises(ValueError, match="crop=65 is larger than an image of 64 x 80"):
        AveragedViews(crop=65).of(tensor)


def test_averaged_scores_are_means_over_views(run: Path, photos: Path) -> None:
    model = widefield.get_model(run)
    tensor = torch.from_numpy(io.imread(photos / "rocket.png")).permute(2, 0, 1)
    sample = predict_samples(model, [tensor], AveragedViews(hflip=True))[0]
    views = torch.stack([tensor, tensor.flip(-1)]) / 255
    torch.testing.assert_close(sample.pred_score, model(views).softmax(1).mean(0).detach())


def test_features_of_every_stage(run: Path, photos: Path) -> None:
    extractor = widefield.FeatureExtractor(run)
    files = [photos / "coffee.png", photos / "rocket.png"]
    shapes: dict[str, Any] = {"backbone": (8, 32, 40), "neck": (8,)}
    for stage, shape in shapes.items():
        assert [tuple(one[0].shape) for one in extractor(files, stage=stage)] == [shape] * 2  # type: ignore[arg-type]
    (vector, _) = extractor(files, stage="pre_logits")
    assert vector.shape == (8,)
    torch.manual_seed(0)
    classifier = Classifier("resnet10_w16", ["a", "b"], tile_size=64).eval()
    of_classifier = widefield.FeatureExtractor(classifier)
    vector = of_classifier(files[0], stage="pre_logits")[0]
    torch.testing.assert_close(vector, of_classifier(files[0])[0][0].mean((1, 2)), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="Linear has no features"):
        widefield.FeatureExtractor(nn.Linear(2, 2))(files[0])


def test_similar_images_are_found_and_their_features_kept(
    run: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "features.pth"
    finder = widefield.ImageRetrievalInferencer(run, photos, cache)
    (found,) = finder(photos / "coffee.png", topk=2)
    assert found[0]["sample"]["img_path"].endswith("coffee.png")
    assert found[0]["match_score"] == pytest.approx(1, abs=1e-5)
    assert found[0]["sample_idx"] == 2
    assert len(found) == 2
    assert found[1]["match_score"] <= found[0]["match_score"]
    content = torch.load(cache, weights_only=True)
    content["vectors"] += 1
    torch.save(content, cache)
    again = widefield.ImageRetrievalInferencer(run, photos, cache)
    torch.testing.assert_close(again.vectors, finder.vectors + 1)

    files = sorted(photos.glob("*.png"))
    with caplog.at_level(logging.WARNING):
        fewer = widefield.ImageRetrievalInferencer(run, files[:3], cache)
    assert "is of other images" in caplog.text
    torch.testing.assert_close(fewer.vectors, finder.vectors[:3])
    with caplog.at_level(logging.WARNING):
        other = widefield.ImageRetrievalInferencer(widefield.get_model(CLASSIFIER), files[:3], cache)
    assert "is of other weights" in caplog.text
    assert not torch.equal(other.vectors, fewer.vectors)
    other.save_prototype(tmp_path / "saved.pth")
    same = widefield.ImageRetrievalInferencer(other.model, files[:3], tmp_path / "saved.pth")
    assert torch.equal(same.vectors, other.vectors)


def test_a_retriever_ranks_by_its_own_similarity(photos: Path) -> None:
    encoder = [CLASSIFIER["backbone"], CLASSIFIER["neck"]]
    model = widefield.get_model(
        {"type": "ImageToImageRetriever", "image_encoder": encoder, "prototype": str(photos), "topk": 3}
    )
    found = widefield.inference_model(model, photos / "rocket.png")
    assert found[0]["sample_idx"] == 3
    assert len(found) == 3
    (by_files,) = widefield.ImageRetrievalInferencer(model, photos)(photos / "rocket.png", topk=3)
    assert [match["sample_idx"] for match in by_files] == [match["sample_idx"] for match in found]
    with pytest.raises(ValueError, match="has no stage 'neck'; give 'backbone'"):
        widefield.FeatureExtractor(model)(photos / "rocket.png", stage="neck")
