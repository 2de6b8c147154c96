"""Classes and calls as users of MMPretrain write them."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from widefield.components import BaseBackbone, BaseSelfSupervisor, DataSample
from widefield.config.check import find_class
from widefield.data.datasets import collate_items
from widefield.data.pipeline import Pipeline
from widefield.registry import DATASETS, METRICS, MODELS, TRANSFORMS


@pytest.fixture(autouse=True)
def registrations() -> Iterator[None]:
    """Forget what a test registers."""
    before = [(registry, dict(registry._registered)) for registry in (MODELS, DATASETS, TRANSFORMS)]
    yield
    for registry, held in before:
        registry._registered = held


def test_a_backbone_and_a_model_that_hand_everything_on_are_built_and_loaded(tmp_path: Path) -> None:
    @MODELS.register_module()
    class Plain(BaseBackbone):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.width = kwargs.pop("width", 3)
            super().__init__(*args, **kwargs)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.width * x,)

    @MODELS.register_module()
    class Learner(BaseSelfSupervisor):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.scale = kwargs.pop("scale", 1.0)
            super().__init__(*args, **kwargs)

    backbone = {"type": "Plain", "width": 2}
    for model in (MODELS.build({"type": "Learner", "backbone": backbone, "scale": 4.0}), Learner(backbone, scale=4.0)):
        assert model.hparams == {"backbone": backbone, "scale": 4.0}
        assert torch.equal(model.extract_feat(torch.ones(1))[0], torch.full((1,), 2.0))
        assert not model.with_neck
        assert not model.with_head
    with pytest.raises(TypeError, match=r"Learner has no argument 'scal'; did you mean scale\?"):
        MODELS.build({"type": "Learner", "backbone": backbone, "scal": 4.0})


def test_a_method_that_nothing_would_call_is_refused() -> None:
    class Steps(BaseSelfSupervisor):
        def train_step(self, data: Any, optim_wrapper: Any) -> None: ...

    with pytest.raises(AssertionError, match=r"Steps has a train_step, which nothing calls: .* training_step"):
        Steps(backbone={"type": "torch.nn.Identity"})


def test_a_sample_is_a_dictionary_too() -> None:
    sample = DataSample(metainfo={"img_path": "a.png"}).set_gt_label(1).set_field("b", "note")
    assert sample.keys() == ["img_path", "gt_label", "note"]
    assert sample.to_dict() == {"img_path": "a.png", "gt_label": torch.tensor([1]), "note": "b"}
    assert sample.pop("note") == "b"
    assert sample.pop("note", None) is None


def test_classes_for_tests_and_bases_are_not_suggested() -> None:
    class _Hidden(torch.optim.Optimizer): ...

    for name in ("Optimiser", "Hidden"):
        with pytest.raises(ValueError, match="no Optimizer named") as error:
            find_class(name, torch.optim.Optimizer)
        assert not {"Optimizer", "_Hidden"} & set(str(error.value).partition(";")[2].replace(",", "").split())


def test_items_of_a_data_set_of_ones_own_are_taken_in_every_usual_form_and_others_refused() -> None:
    picture = torch.zeros(3, 4, 4)
    sample = DataSample().set_gt_label(1)
    for item in ((picture, sample), (picture, 1), {"inputs": picture, "data_samples": sample}):
        inputs, samples = collate_items([item, item])  # type: ignore[list-item]
        assert inputs.shape == (2, 3, 4, 4)
        assert [one.gt_label.tolist() for one in samples] == [[1], [1]]
    views, _ = collate_items([([picture, picture], sample)])
    assert len(views) == 2
    for wrong in (picture, (picture,), ("a.png", 1), {"img": picture, "gt_label": 1}, None):
        with pytest.raises(ValueError, match=r"an item of a data set is .*; it must be \(picture, DataSample\)"):
            collate_items([wrong])  # type: ignore[list-item]


def test_views_of_several_kinds_are_counted_each() -> None:
    large, small = [{"type": "Resize", "size": [4, 4]}], [{"type": "Resize", "size": [2, 2]}]
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)

    def sides(**options: Any) -> list[int]:
        return [view.shape[1] for view in TRANSFORMS.build({"type": "MultiView", **options})(picture)]

    assert sides(transforms=[large, small], num_views=[2, 3]) == [4, 4, 2, 2, 2]
    assert sides(transforms=[large], num_views=2) == sides(transforms=large) == [4, 4]
    with pytest.raises(ValueError, match="one number for each of 2 kinds"):
        sides(transforms=[large, small], num_views=[2])


def test_a_prefix_names_what_a_metric_computes() -> None:
    scores, classes = torch.tensor([[0.2, 0.8], [0.6, 0.4]]), torch.tensor([1, 1])
    labels = torch.tensor([[0, 1], [1, 0]])
    targets = {"MultiLabelMetric": labels, "AveragePrecision": labels}
    targets |= {"RetrievalRecall": labels, "RetrievalAveragePrecision": labels}
    for name in METRICS.names():
        if name.startswith(("Accuracy", "SingleLabel", "MultiLabel", "Average", "Confusion", "Retrieval")):
            given = {"topk": 1} if name == "RetrievalRecall" else {}
            metric = METRICS.build({"type": name, "prefix": "mine", **given})
            metric.update(scores, targets.get(name, classes))
            assert all(key.startswith("mine/") for key in metric.compute())


def test_images_that_are_left_out_for_their_ending_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/1.png", "a/2.bmp", "b/1.ppm", "b/2.tga"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith("tga"):
            (tmp_path / name).write_bytes(b"\0")
        else:
            Image.new("RGB", (4, 4)).save(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        assert len(DATASETS.build({"type": "ImageFolder", "root": tmp_path})) == 3
        assert "left out: 1 of .tga;" in caplog.text
        assert len(DATASETS.build({"type": "ImageFolder", "root": tmp_path, "extensions": (".png",)})) == 1
    assert "1 of .bmp, 1 of .ppm, 1 of .tga" in caplog.text


def test_a_transform_of_dictionaries_is_answered_with_what_a_transform_is() -> None:
    @TRANSFORMS.register_module()
    class Invert:
        def __call__(self, results: Any) -> Any:
            results["img"] = 255 - results["img"]
            return results

    @TRANSFORMS.register_module()
    class Nothing:
        def __call__(self, results: Any) -> Any:
            return None

    picture = torch.zeros(3, 4, 4)
    with pytest.raises(ValueError, match=r"Invert was given a picture \(Tensor\) and failed with .*, not a dictionary"):
        Pipeline([{"type": "Invert"}])(picture)
    with pytest.raises(ValueError, match=r"Nothing was given a picture .* and returned nothing"):
        Pipeline([{"type": "MultiView", "transforms": [{"type": "Nothing"}]}])(picture)


def test_a_bare_name_means_the_class_of_torch_whatever_else_is_imported() -> None:
    others = [type(name, (torch.optim.Optimizer,), {"__module__": m}) for m in ("a", "b") for name in ("SGD", "Fancy")]
    assert find_class("SGD", torch.optim.Optimizer) is torch.optim.SGD
    with pytest.raises(
        ValueError, match=r"there are several classes named 'Fancy': give the import path, a.Fancy or b.Fancy"
    ):
        find_class("Fancy", torch.optim.Optimizer)
    del others
