"""Data preprocessors, batch augmentations, masks and crops."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.components.lazy import Lazy
from widefield.components import DataSample
from widefield.components.transforms.masks import (
    BEiTMaskGenerator,
    RandomMaskGenerator,
    RandomResizedCropAndInterpolationWithTwoPic,
)
from widefield.registry import MODELS

MEAN, STD = [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]
CLASSIFIER: dict[str, Any] = {
    "type": "ImageClassifier",
    "backbone": {"type": "ResNet", "depth": 18, "stem_channels": 4, "base_channels": 4, "out_indices": [0, 1, 2, 3]},
    "neck": {"type": "GlobalAveragePooling"},
    "head": {"type": "LinearClsHead", "num_classes": 3, "in_channels": 32},
}
MIXUP = {"augments": [{"type": "Mixup", "alpha": 0.8}]}


def made(**arguments: Any) -> Any:
    return MODELS.build({"type": "ClsDataPreprocessor", **arguments})


def labelled(*labels: int) -> list[DataSample]:
    return [DataSample().set_gt_label(label) for label in labels]


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_mean_and_std_are_in_units_of_pixels() -> None:
    image = pixels(2, 3, 4, 5)
    expected = torch.stack([(image[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    for to_rgb in (False, True):
        torch.testing.assert_close(made(mean=MEAN, std=STD, to_rgb=to_rgb)({"inputs": image})["inputs"], expected)
    floats = made(mean=MEAN, std=STD)({"inputs": image.double()})["inputs"]
    torch.testing.assert_close(floats, expected.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made()({"inputs": image})["inputs"], image / 255)
    torch.testing.assert_close(made()({"inputs": image / 255})["inputs"], image / 255)
    with pytest.raises(ValueError, match="mean and std go together"):
        made(mean=MEAN)
    with pytest.raises(ValueError, match="mean and std have 3 values, the image has 1 channels"):
        made(mean=MEAN, std=STD)({"inputs": image[:, :1]})


def test_images_of_several_sizes_are_padded_behind_normalising() -> None:
    images = [pixels(3, 4, 7), pixels(3, 6, 5)]
    batch = made(mean=MEAN, std=STD, pad_value=9)({"inputs": images})["inputs"]
    assert batch.shape == (2, 3, 6, 7)
    torch.testing.assert_close(batch[1, 0, :, :5], (images[1][0] - MEAN[0]) / STD[0])
    assert (batch[1, :, :, 5:] == 9).all()
    assert (batch[0, :, 4:] == 9).all()
    divided = made(pad_size_divisor=4)
    assert divided({"inputs": images})["inputs"].shape == (2, 3, 8, 8)
    assert divided({"inputs": pixels(1, 3, 4, 9)})["inputs"].shape == (1, 3, 4, 12)


def test_images_that_are_read_tile_by_tile_are_left_alone() -> None:
    images = [Lazy(pixels(3, 4, 7))]
    assert made(mean=MEAN, std=STD)({"inputs": images, "data_samples": labelled(0)})["inputs"] is images
    with pytest.raises(ValueError, match="pads none"):
        made(pad_size_divisor=4)({"inputs": images})
    with pytest.raises(ValueError, match="cannot be mixed"):
        made(num_classes=2, batch_augments=MIXUP)({"inputs": images, "data_samples": labelled(0)}, training=True)


def test_labels_become_scores_of_a_copy() -> None:
    samples = [*labelled(2), DataSample().set_gt_label([0, 1]), DataSample().set_gt_score([0.5, 0.5, 0])]
    found = made(to_onehot=True, num_classes=3)({"inputs": pixels(3, 3, 4, 4), "data_samples": samples})["data_samples"]
    assert [sample.gt_score.tolist() for sample in found] == [[0, 0, 1], [1, 1, 0], [0.5, 0.5, 0]]
    assert "gt_score" not in samples[0]
    unlabelled = [DataSample()]
    with_augments = made(num_classes=3, batch_augments=MIXUP)
    data = {"inputs": pixels(1, 3, 4, 4), "data_samples": unlabelled}
    assert with_augments(data)["data_samples"][0] is unlabelled[0]
    with pytest.raises(ValueError, match="there are samples without; label them all"):
        with_augments(data, training=True)
    with pytest.raises(ValueError, match="need num_classes"):
        made(to_onehot=True)({"inputs": pixels(1, 3, 4, 4), "data_samples": samples[:1]})
    with pytest.raises(ValueError, match="num_classes=2, and there is the label 2"):
        made(to_onehot=True, num_classes=2)({"inputs": pixels(1, 3, 4, 4), "data_samples": samples[:1]})


@pytest.mark.parametrize(
    "augment",
    [
        {"type": "Mixup", "alpha": 0.8},
        {"type": "CutMix", "alpha": 1.0},
        {"type": "CutMix", "alpha": 1.0, "cutmix_minmax": [0.2, 0.8]},
        {"type": "ResizeMix", "alpha": 1.0},
    ],
    ids=lambda augment: "-".join([augment["type"], *list(augment)[2:]]),
)
def test_scores_are_mixed_as_pixels_are(augment: dict[str, Any]) -> None:
    """Image k is the constant k: the mean of a mixed image is that of k under its scores."""
    preprocessor = made(num_classes=4, batch_augments={"augments": augment})
    assert preprocessor.to_onehot
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 9, 11)
    torch.manual_seed(0)
    shares = set()
    for _ in range(20):
        data = preprocessor({"inputs": images, "data_samples": labelled(0, 1, 2, 3)}, training=True)
        scores = torch.stack([sample.gt_score for sample in data["data_samples"]])
        torch.testing.assert_close(scores.sum(1), torch.ones(4))
        torch.testing.assert_close(data["inputs"].mean((1, 2, 3)), scores @ torch.arange(4.0))
        if augment["type"] != "Mixup":
            assert all(len(image.round(decimals=3).unique()) <= 2 for image in data["inputs"])
        shares.add(round(scores.max(1).values.min().item(), 4))
    assert len(shares) > 5
    untouched = preprocessor({"inputs": images, "data_samples": labelled(0, 1, 2, 3)})["inputs"]
    assert torch.equal(untouched, images)


def test_a_resized_image_is_shown_as_a_whole() -> None:
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    batch = torch.cat([ramp + 2, ramp + 4])
    augment = {"type": "ResizeMix", "alpha": 1.0, "lam_min": 0.2, "lam_max": 0.2}
    preprocessor = made(num_classes=2, batch_augments={"augments": augment})
    torch.manual_seed(1)
    for _ in range(20):
        mixed = preprocessor({"inputs": batch, "data_samples": labelled(0, 1)}, training=True)["inputs"]
        patch = mixed[0][mixed[0] >= 4]
        if len(patch):
            assert patch.max() - patch.min() > 0.9
            break
    assert len(patch)


def test_augmentations_are_drawn_by_their_probability() -> None:
    def mixed(probs: Any) -> float:
        augments = [{"type": "Mixup", "alpha": 1.0}, {"type": "CutMix", "alpha": 1.0}]
        preprocessor = made(num_classes=2, batch_augments={"augments": augments, "probs": probs})
        images = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 2, 2)
        torch.manual_seed(0)
        batches = [preprocessor({"inputs": images, "data_samples": labelled(0, 1)}, training=True) for _ in range(200)]
        return sum(batch["inputs"] is not images for batch in batches) / 200

    assert mixed([0.0, 0.0]) == 0
    assert mixed(None) == 1
    assert mixed([0.1, 0.2]) == pytest.approx(0.3, abs=0.1)
    for wrong in ([0.5], [0.6, 0.6], [-0.1, 0.5]):
        with pytest.raises(ValueError, match=r"probs=.* must be a probability for each of 2 augments"):
            mixed(wrong)


def test_train_cfg_augments_batches_of_a_classifier() -> None:
    torch.manual_seed(0)
    model = MODELS.build({**CLASSIFIER, "train_cfg": MIXUP})
    assert model.data_preprocessor.batch_augments is not None
    assert MODELS.build({**CLASSIFIER, "train_cfg": {}}).data_preprocessor.batch_augments is None
    assert model.data_preprocessor.num_classes == 3
    inputs, samples = model.preprocess((pixels(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])), training=True)
    scores = torch.stack([sample.gt_score for sample in samples])
    assert ((scores > 0).sum(1) == 2).any()
    model.eval()
    expected = -(scores * model(inputs).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(model.loss(inputs, samples)["loss"], expected)
    with pytest.raises(ValueError, match="give batch_augments to that, and leave train_cfg away"):
        MODELS.build({**CLASSIFIER, "train_cfg": MIXUP, "data_preprocessor": made()})


def test_a_data_preprocessor_is_given_in_every_form() -> None:
    numbers = {"mean": MEAN, "std": STD}
    path = "widefield.components.SelfSupDataPreprocessor"
    for given, name in (
        (numbers, "ClsDataPreprocessor"),
        ({"type": "SelfSupDataPreprocessor", **numbers}, "SelfSupDataPreprocessor"),
        ({"class_path": path, "init_args": numbers}, "SelfSupDataPreprocessor"),
        (made(**numbers), "ClsDataPreprocessor"),
    ):
        preprocessor = MODELS.build({**CLASSIFIER, "data_preprocessor": given}).data_preprocessor
        assert type(preprocessor).__name__ == name
        assert preprocessor.normalisation.mean == tuple(MEAN)


def test_a_classifier_normalises_what_it_trains_on() -> None:
    torch.manual_seed(0)
    model = MODELS.build({**CLASSIFIER, "data_preprocessor": {"mean": MEAN, "std": STD}}).eval()
    model.log_dict = lambda *_, **__: None
    images, labels = pixels(2, 3, 32, 32), torch.tensor([0, 2])
    expected = model.loss(made(mean=MEAN, std=STD)({"inputs": images})["inputs"], labelled(0, 2))["loss"]
    for inputs in (images, list(images), [Lazy(image) for image in images]):
        torch.testing.assert_close(model.training_step((inputs, labels), 0), expected)
        data = {"inputs": inputs, "data_samples": labelled(0, 2)}
        torch.testing.assert_close(model.training_step(data, 0), expected)
    assert [len(model.predict_step(batch, 0)) for batch in (images, {"inputs": images}, (images, labels))] == [2, 2, 2]
    with pytest.raises(ValueError, match=r"a batch is \(inputs, targets\), .* not a dictionary with image"):
        model.training_step({"image": images}, 0)


def test_blocks_mask_exactly_so_many_patches_at_every_draw() -> None:
    generator = BEiTMaskGenerator(14, 75, min_num_patches=16)
    torch.manual_seed(0)
    masks = [generator() for _ in range(50)]
    assert all(mask.shape == (14, 14) and mask.dtype == torch.int64 and mask.sum() == 75 for mask in masks)
    assert all(set(mask.unique().tolist()) == {0, 1} for mask in masks)
    assert not torch.equal(masks[0], masks[1])
    torch.manual_seed(0)
    assert torch.equal(generator(), masks[0])
    for size, count in ((2, 4), ((1, 5), 3), (3, 8)):  # no block of 16 patches fits
        assert BEiTMaskGenerator(size, count, min_num_patches=16)().sum() == count
    for wrong in (
        {"num_masking_patches": 0},
        {"num_masking_patches": 197},
        {"num_masking_patches": 3, "min_aspect": 0},
    ):
        with pytest.raises(ValueError, match=r"num_masking_patches=|min_aspect="):
            BEiTMaskGenerator(14, **wrong)


def test_single_patches_are_masked_with_one_probability() -> None:
    torch.manual_seed(0)
    generator = RandomMaskGenerator((4, 5), 0.4)
    masks = torch.stack([generator() for _ in range(500)])
    assert (masks.sum((1, 2)) == 8).all()
    assert (masks.float().mean(0) - 0.4).abs().max() < 0.1
    with pytest.raises(ValueError, match=r"mask_ratio=1.0 masks 20 of 4 x 5 patches"):
        RandomMaskGenerator((4, 5), 1.0)


def test_two_pictures_show_one_crop() -> None:
    y, x = torch.meshgrid(torch.arange(80.0), torch.arange(60.0), indexing="ij")
    image = torch.stack([y, x])
    crop = RandomResizedCropAndInterpolationWithTwoPic(24, 12, scale=(0.3, 0.6), second_interpolation="bilinear")
    torch.manual_seed(0)
    first, second = crop(image)
    assert (first.shape, second.shape) == ((2, 24, 24), (2, 12, 12))
    torch.testing.assert_close(first.mean((1, 2)), second.mean((1, 2)), rtol=0.02, atol=0.1)
    torch.manual_seed(0)

    class Counting(Lazy):
        read_pixels = 0

        def read(self, y: int, x: int, height: int, width: int) -> Tensor:
            self.read_pixels += height * width
            return super().read(y, x, height, width)

    lazy = Counting(image)
    assert torch.equal(crop(lazy)[0], first)
    assert 0.25 < lazy.read_pixels / (80 * 60) < 0.65
    assert RandomResizedCropAndInterpolationWithTwoPic((8, 16))(pixels(3, 40, 40))[1].shape == (3, 8, 16)
