"""Data sets that a configuration describes, and their batches."""

import logging
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
import torchvision.transforms.v2
import torchvision.tv_tensors
from PIL import Image
from skimage import data, io
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from tests.data.cifar_files import CIFAR10_NAMES, write_cifar10
from tests.small_images import write_image
from widefield.data import CIFAR10, CIFAR100, DATASETS, TRANSFORMS, AnnotationFile, Datasets, ImageFolder, LabelError
from widefield.images import ImageFile


def write_classes(root: Path, per_class: int = 2) -> Path:
    generator = np.random.default_rng(0)
    for name in ("bird", "ant"):
        (root / name / "deep").mkdir(parents=True)
        for k in range(per_class):
            write_image(
                root / name / ("deep" if k else "") / f"{k}.png", generator.integers(0, 255, (20, 24, 3), np.uint8)
            )
    return root


def test_the_classes_of_a_folder_are_its_sorted_sub_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_classes(tmp_path)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "ant" / ".hidden.png").write_text("no image")
    found = ImageFolder(tmp_path)
    theirs = torchvision.datasets.ImageFolder(
        str(tmp_path), is_valid_file=lambda path: "/0.png" in path or "/1.png" in path
    )
    assert found.class_names == theirs.classes == ["ant", "bird"]
    assert [(str(file), found.label(k)) for k, file in enumerate(found.files)] == theirs.samples
    picture, sample = found[3]
    assert isinstance(picture, ImageFile)
    assert sample.gt_label.tolist() == [1]
    assert (sample.sample_idx, sample.img_path) == (3, str(tmp_path / "bird" / "deep" / "1.png"))
    (tmp_path / "cat").mkdir()
    with caplog.at_level(logging.WARNING):
        assert ImageFolder(tmp_path).class_names == ["ant", "bird", "cat"]
    assert "no images of cat" in caplog.text
    assert len(ImageFolder(tmp_path, with_label=False)) == 4
    assert "gt_label" not in ImageFolder(tmp_path, with_label=False)[0][1]


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(LabelError, match="has no sub-folders"):
        ImageFolder(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(LabelError, match=r"holds no images; those end in \.bif"):
        ImageFolder(tmp_path)


def test_an_annotation_file_names_images_and_labels(tmp_path: Path) -> None:
    write_image(tmp_path / "a b.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "list.txt").write_text("# comment\n\na b.png 1\n")
    found = AnnotationFile(tmp_path, "list.txt", ["x", "y"])
    assert found[0][1].gt_label.tolist() == [1]
    for line, message in (
        ("a b.png", "does not end in the index"),
        ("a b.png 2", "label 2 is beyond the 2 class names"),
        ("a b.png 0,1", "need multi_label=true"),
        ("", "names no image"),
    ):
        (tmp_path / "list.txt").write_text(line)
        with pytest.raises(LabelError, match=message):
            AnnotationFile(tmp_path, "list.txt", ["x", "y"])
    (tmp_path / "list.txt").write_text("a b.png 0,1\na b.png -")
    several = AnnotationFile(tmp_path, "list.txt", multi_label=True)
    assert [sample.gt_label.tolist() for _, sample in (several[0], several[1])] == [[0, 1], []]
    (tmp_path / "list.txt").write_text("gone.png 0")
    with pytest.raises(FileNotFoundError, match=r"gone\.png, which does not exist"):
        AnnotationFile(tmp_path, "list.txt")


def test_cifar_is_read_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [("data_batch_1", ""), ("data_batch_2", "")])
    for train in (True, False):
        found, theirs = CIFAR10(tmp_path, train), torchvision.datasets.CIFAR10(str(tmp_path), train)
        assert found.class_names == CIFAR10_NAMES
        assert len(found) == len(theirs)
        for (picture, sample), (image, label) in zip((found[k] for k in range(len(found))), theirs, strict=True):
            np.testing.assert_array_equal(picture.permute(1, 2, 0), np.asarray(image))
            assert sample.gt_label.item() == label
    assert len(CIFAR10(tmp_path / "cifar-10-batches-py")) == 16
    with pytest.raises(FileNotFoundError, match=r"no train in .*unpacked cifar-100-python"):
        CIFAR100(tmp_path)


def test_a_pickle_executes_nothing(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    for content, message in (
        (Evil(), "only arrays and plain data"),
        ([1], "holds a list"),
        ({"data": 3}, "has no data"),
    ):
        (tmp_path / "test_batch").write_bytes(pickle.dumps(content))
        with pytest.raises(LabelError, match=message):
            CIFAR10(tmp_path, train=False)
    assert not (tmp_path / "executed").exists()


def test_transforms_by_name_are_those_of_torchvision() -> None:
    of_torchvision = [entry.name for entry in TRANSFORMS.entries() if entry.summary == "from torchvision"]
    assert len(of_torchvision) > 30
    for name in of_torchvision:
        assert TRANSFORMS.get(name) is getattr(torchvision.transforms.v2, name)
    for entry in (*TRANSFORMS.entries(), *DATASETS.entries()):
        assert (TRANSFORMS if entry.name in TRANSFORMS else DATASETS).get(entry.name)


def test_transforms_keep_the_type_of_the_pixels(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    io.imsave(tmp_path / "cat" / "chelsea.png", data.chelsea(), check_contrast=False)
    resized = ImageFolder(tmp_path, transforms=[{"type": "Resize", "size": [20, 30], "interpolation": "bicubic"}])[0][0]
    assert type(resized) is torch.Tensor
    assert (resized.dtype, resized.shape) == (torch.uint8, (3, 20, 30))
    whole = torchvision.transforms.v2.functional.resize(
        torch.from_numpy(data.chelsea()).permute(2, 0, 1), [20, 30], torchvision.transforms.InterpolationMode.BICUBIC
    )
    torch.testing.assert_close(resized, whole)
    policy = {"type": "AutoAugment", "policy": "CIFAR10"}
    assert ImageFolder(tmp_path, transforms=[policy])[0][0].shape == whole.shape[:1] + data.chelsea().shape[:2]
    with pytest.raises(ValueError, match="no transform named 'RandomCrops'; did you mean RandomCrop"):
        ImageFolder(tmp_path, transforms=[{"type": "RandomCrops", "size": 3}])


def batch(transforms: list[dict[str, Any]], root: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    described = {"type": "ImageFolder", "root": root, "transforms": transforms, **options}
    return next(iter(Datasets(described, batch_size=3, num_workers=0).train_dataloader()))


def test_batches_suit_classifiers_and_self_supervised_models(tmp_path: Path) -> None:
    write_classes(tmp_path)
    inputs, samples = batch([], tmp_path)
    assert all(isinstance(one, ImageFile) for one in inputs)
    assert len(inputs) == len(samples) == 3
    inputs, _ = batch([{"type": "RandomHorizontalFlip"}], tmp_path)
    assert (inputs.shape, inputs.dtype) == ((3, 3, 20, 24), torch.uint8)
    inputs, _ = batch([{"type": "MultiView", "transforms": [{"type": "RandomCrop", "size": 8}]}], tmp_path)
    assert [view.shape for view in inputs] == [(3, 3, 8, 8)] * 2
    assert not torch.equal(*inputs)
    two = {"type": "RandomResizedCropAndInterpolationWithTwoPic", "size": 16, "second_size": 8}
    mask = {"type": "BEiTMaskGenerator", "input_size": 4, "num_masking_patches": 6}
    inputs, samples = batch([{"type": "RandomHorizontalFlip"}, two], tmp_path, with_label=False, mask_generator=mask)
    assert [view.shape for view in inputs] == [(3, 3, 16, 16), (3, 3, 8, 8)]
    assert [int(sample.mask.sum()) for sample in samples] == [6, 6, 6]


def test_views_of_several_kinds_come_in_their_order(tmp_path: Path) -> None:
    kinds = [[{"type": "RandomCrop", "size": 8}], [{"type": "CenterCrop", "size": 4}]]
    inputs, _ = batch([{"type": "MultiView", "transforms": kinds, "num_views": [2, 1]}], write_classes(tmp_path))
    assert [view.shape[-1] for view in inputs] == [8, 8, 4]
    with pytest.raises(ValueError, match="one number for each of 2 kinds"):
        TRANSFORMS.build({"type": "MultiView", "transforms": kinds, "num_views": [2]})


@pytest.mark.parametrize(("p", "side"), [(0.0, 20), (1.0, 8)])
def test_transforms_are_applied_all_or_none(p: float, side: int, tmp_path: Path) -> None:
    both = [{"type": "CenterCrop", "size": 12}, {"type": "CenterCrop", "size": 8}]
    inputs, _ = batch([{"type": "RandomApply", "transforms": both, "p": p}, {"type": "RGB"}], write_classes(tmp_path))
    assert inputs.shape[-2] == side


def test_rand_augment_of_timm_is_that_of_its_recipe() -> None:
    picture = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8)
    ours = TRANSFORMS.build({"type": "TimmRandAugment", "fill": [1, 2, 3], "interpolation": "bilinear"})
    hparams = {"img_mean": (1, 2, 3), "interpolation": Image.Resampling.BILINEAR}
    theirs = rand_augment_transform("rand-m9-n2-mstd0.5-inc1", hparams)
    found = []
    for augment in (ours, lambda image: pil_to_tensor(theirs(to_pil_image(image)))):
        random.seed(3)
        np.random.seed(3)
        found.append(torch.stack([augment(picture) for _ in range(8)]))
    assert torch.equal(*found) and not torch.equal(found[0][0], picture)
    with pytest.raises(ValueError, match=r"3 channels of 8 bits, got 1 of torch.float32; write \{type: RGB\}"):
        ours(torch.zeros(1, 4, 4))


def test_erased_boxes_have_the_mean_and_deviation_that_is_given() -> None:
    torch.manual_seed(0)
    options = {"p": 1.0, "scale": [0.5, 0.5], "ratio": [1, 1], "mean": [20, 100, 250], "std": [0, 9, 30]}
    erase = TRANSFORMS.build({"type": "RandomNoiseErasing", **options})
    picture = torchvision.tv_tensors.Image(torch.full((3, 100, 100), 7, dtype=torch.uint8))
    erased = erase(picture)
    box = erased[:, erased[0] == 20].float()
    assert box.shape[1] == 71 * 71
    assert box[1].mean() == pytest.approx(100, abs=0.5) and box[1].std() == pytest.approx(9, abs=0.3)
    assert box[2].max() == 255  # and is not counted on from 0
    assert (erased[0] == 7).sum() == 10_000 - 71 * 71


def test_data_sets_go_to_worker_processes(tmp_path: Path) -> None:
    found = ImageFolder(write_classes(tmp_path), transforms=[{"type": "CenterCrop", "size": 8}])
    assert torch.equal(pickle.loads(pickle.dumps(found))[2][0], found[2][0])


def test_data_sets_of_different_classes_are_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "train")
    (tmp_path / "val" / "cat").mkdir(parents=True)
    write_image(tmp_path / "val" / "cat" / "0.png", np.zeros((8, 8, 3), np.uint8))
    train, val = ({"type": "ImageFolder", "root": tmp_path / name} for name in ("train", "val"))
    with pytest.raises(LabelError, match="the classes are ant, bird, and those of another data set are cat"):
        Datasets(train, val)
    data_module = Datasets(train)
    data_module.load_state_dict(data_module.state_dict())
    with pytest.raises(LabelError, match="the classes are x"):
        data_module.load_state_dict({"class_names": ["x"]})
    with pytest.raises(ValueError, match="there are no data sets"):
        Datasets()
    with pytest.raises(ValueError, match="nothing to train on"):
        Datasets(val=val).train_dataloader()
