"""Images with a background are trained on, explained and predicted over their foreground alone."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.slides import write_blank_slide
from tests.streaming.masked import foreground, masked
from widefield.components.models.image_classifier import ImageClassifier
from widefield.data.labelled_images import LabelledImages
from widefield.data.statistics import pixel_statistics
from widefield.images import Background, ForegroundChoice, ImageFile, Mask, open_image
from widefield.inference import ImageClassificationInferencer
from widefield.inference.averaged_views import AveragedViews
from widefield.inference.features import features_of
from widefield.inference.masks import keep_background_if_usable
from widefield.inference.models import ModelInfo, set_info
from widefield.inference.prediction import predict_samples
from widefield.modules import BaseModule, ImageNetClassifier
from widefield.registry import MODELS
from widefield.reports import Heatmap, cells_of, class_activation, grad_cam

SIZE = (60, 72)
FILL = (200.0, 30.0, 7.0)


def image_with_background(required: bool = False) -> ImageFile:
    """An image of noise, and a mask of two blobs."""
    image = open_image(np.random.default_rng(0).integers(0, 255, (3, *SIZE), dtype=np.uint8))
    cells = np.zeros((6, 7), bool)
    cells[1:3, 1:4] = cells[5, 6] = True
    image.background = Background(Mask(cells), FILL, required)
    return image


def trunk() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.GELU(), nn.Conv2d(4, 5, 3, 2, 1))


def head(pool: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(pool or nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))


def module(pool: nn.Module | None = None) -> BaseModule:
    torch.manual_seed(0)
    return BaseModule(trunk(), head(pool), 16, nn.CrossEntropyLoss()).double()


def expected(net: nn.Module, image: ImageFile) -> Any:
    """What a network gives for an image, by the definition of a mask."""
    pixels = torch.from_numpy(image.read(0, 0, *SIZE))[None].double() / 255
    fill = torch.tensor(FILL).double().view(3, 1, 1) / 255
    cells = torch.from_numpy(image.background.mask.cells)[None]
    return masked(net, torch.where(foreground(cells, SIZE), pixels, fill), cells, fill)


@pytest.mark.parametrize("pool", [None, nn.AdaptiveMaxPool2d(1)])
def test_training_steps_and_their_gradients_are_those_of_the_foreground(pool: nn.Module | None) -> None:
    model, image = module(pool), image_with_background()
    whole = open_image(image._source)  # a batch may hold images with and without a background
    found = model([image, whole])
    by_definition = expected(nn.Sequential(model.stream_network.module, model.head), image)
    torch.testing.assert_close(found[:1], by_definition, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[1:], model(whole))
    parameters = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(found[0].square().sum(), parameters),
        torch.autograd.grad(by_definition.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert list(model.state_dict()) == [
        *(f"stream_network.module.{key}" for key in model.stream_network.module.state_dict()),
        "head.2.weight", "head.2.bias",
    ]  # fmt: skip


def image_classifier(**backbone: Any) -> ImageClassifier:
    torch.manual_seed(0)
    small = {"type": "ResNet_CIFAR", "depth": 18, "num_stages": 2, "stem_channels": 4, "base_channels": 4}
    described = {**small, "strides": (1, 2), "dilations": (1, 1), "out_indices": (1,), "streaming": {"tile_size": 32}}
    made: ImageClassifier = MODELS.build(
        {
            "type": "ImageClassifier",
            "backbone": {**described, **backbone},
            "neck": {"type": "GlobalAveragePooling"},
            "head": {"type": "LinearClsHead", "num_classes": 2, "in_channels": 8},
        }
    )
    return made.double().eval()


def test_models_of_components_pool_over_the_foreground() -> None:
    model, image = image_classifier(), image_with_background()
    plain = image_classifier(streaming=None)

    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plain.head(plain.neck(plain.backbone(x)))

    with torch.no_grad():
        by_definition = expected(Logits(), image).softmax(1)[0]
    (sample,) = predict_samples(model, [image])
    torch.testing.assert_close(sample.pred_score, by_definition, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(image).softmax(1)[0], by_definition, rtol=1e-10, atol=1e-12)
    scores, evidence = grad_cam(model, image)
    torch.testing.assert_close(scores.double(), by_definition, rtol=1e-6, atol=1e-6)
    heatmap = Heatmap.of(evidence, cells_of(model, image, evidence), image)
    assert np.isnan(heatmap.evidence).any() and not np.isnan(heatmap.evidence).all()


def test_pixels_are_measured_in_the_foreground_of_an_image_that_has_a_background() -> None:
    image = image_with_background()
    np.testing.assert_array_equal(pixel_statistics([image], seed=0).masks[0], image.background.mask.cells)
    image.background = None
    assert pixel_statistics([image], seed=0).masks[0].shape == SIZE


def test_there_is_no_evidence_in_the_background() -> None:
    image, model = image_with_background(), ImageNetClassifier(trunk(), head(), 16).double().eval()
    _, evidence = class_activation(model, image, 0)
    heatmap = Heatmap.of(evidence, cells_of(model, image, evidence), image)
    cells = torch.from_numpy(image.background.mask.cells)[None]
    np.testing.assert_array_equal(~np.isnan(heatmap.evidence), foreground(cells, (15, 18))[0, 0].numpy())


def test_flipped_views_have_flipped_masks_and_crops_none() -> None:
    model, image = module(), image_with_background()
    plain = model.stream_network.module
    with torch.no_grad():
        found = predict_samples(model, [image], AveragedViews(hflip=True, vflip=True))[0].pred_score
        one, *others = (view for view in AveragedViews(hflip=True, vflip=True).of(image))
        each = [expected(nn.Sequential(plain, model.head), view)[0] for view in (one, *others)]
    torch.testing.assert_close(found, torch.stack(each).mean(0), rtol=1e-10, atol=1e-12)
    crops = AveragedViews(crop=16).of(image)
    assert all(crop.background is None for crop in crops)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="crops of an image take no mask"):
        predict_samples(model, [image_with_background(required=True)], AveragedViews(crop=16))


class Ranked(nn.Module):
    """A pooling that needs all positions at once."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).sort(-1).values[..., -1:, None]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: module(Ranked()), "streamed as a whole"),
        (lambda: image_classifier(streaming=None), "does not stream"),
        (lambda: image_classifier(out_indices=(0, 1)), "one map"),
    ],
)
def test_a_model_that_takes_no_mask_says_so_once_or_refuses_what_was_asked_for(
    make: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make().train()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            image = image_with_background()
            assert not keep_background_if_usable(model, image) and image.background is None
    told = [record.getMessage() for record in caplog.records if "background is not left out" in record.getMessage()]
    assert len(told) == 1 and reason in told[0]
    assert model.training
    with pytest.raises(ValueError, match=f"{reason}.*--foreground none"):
        keep_background_if_usable(model, image_with_background(required=True))


def test_models_that_take_masks_keep_the_background_and_have_features_of_the_rest() -> None:
    model, image = image_classifier(), image_with_background()
    assert keep_background_if_usable(model, image) and image.background is not None
    (found,) = features_of(model, image, "neck")
    image.background = None
    assert not torch.allclose(features_of(model, image, "neck")[0], found)


def test_inferencers_take_a_foreground_and_have_that_of_the_training_by_default(tmp_path: Path) -> None:
    path = write_blank_slide(tmp_path / "a.tif")
    model, image = module().eval(), open_image(path)
    model.tile_size = 512
    found = {}
    for trained, given in (("none", None), ("auto", None), ("none", "auto"), ("auto", "none")):
        set_info(model, ModelInfo(("a", "b"), foreground=trained))
        (result,) = ImageClassificationInferencer(model, foreground=given)(path)
        found[trained, given] = result["pred_scores"]
    np.testing.assert_array_equal(found["none", None], found["auto", "none"])
    np.testing.assert_array_equal(found["auto", None], found["none", "auto"])
    image.background = ForegroundChoice().of(image)
    np.testing.assert_allclose(found["auto", None], model.predict_step(image, 0)[0].detach().float().numpy(), rtol=1e-6)
    assert abs(found["auto", None] - found["none", None]).max() > 1e-4


def test_one_polygon_file_is_for_one_image_and_the_masks_of_a_data_set_are_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["image,label"]
    for index in range(2):
        write_blank_slide(tmp_path / "images" / f"{index}.tif")
        rows.append(f"{index},{'ab'[index]}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    (tmp_path / "a.geojson").write_text("{}")
    with pytest.raises(ValueError, match="is the foreground of one image, and there are 2"):
        LabelledImages(tmp_path / "images", tmp_path / "labels.csv", foreground=str(tmp_path / "a.geojson"))
    data = LabelledImages(tmp_path / "images", tmp_path / "labels.csv", val_fraction=0)
    monkeypatch.setattr(ForegroundChoice, "of", None)
    assert data.train_set[0][0].background.mask.share < 0.2
    assert data.state_dict()["foreground"] == "auto"
    monkeypatch.undo()
    data.take_all_of_images()
    assert data.train_set[0][0].background is None and data.state_dict()["foreground"] == "none"
