"""Retrieval of images by an image."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.components.lazy import Lazy
from tests.small_images import write_folder
from widefield.components import DataSample
from widefield.components.metrics import METRICS
from widefield.inference.evaluation import Evaluation
from widefield.registry import MODELS

PROTOTYPES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
QUERIES = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
ENCODER = [
    {"type": "ResNet", "depth": 18, "stem_channels": 4, "base_channels": 4, "num_stages": 2, "out_indices": [0, 1]},
    {"type": "GlobalAveragePooling"},
]


class Rows(Dataset):
    """The prototypes, in the reverse of the order that their samples name."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, DataSample]:
        return PROTOTYPES[2 - index], DataSample(sample_idx=2 - index)


class Images(Dataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8), index % 2


def made(prototype: Any = PROTOTYPES, **changes: Any) -> Any:
    torch.manual_seed(0)
    description = {"type": "ImageToImageRetriever", "image_encoder": {"type": "torch.nn.Identity"}}
    return MODELS.build({**description, "prototype": prototype, **changes})


def test_known_scores_and_rankings() -> None:
    samples = [DataSample(), DataSample()]
    found = made()(QUERIES, samples, mode="predict")
    assert found[0] is samples[0]
    torch.testing.assert_close(found[0].pred_score, torch.tensor([1, 0, 0.707107]))
    torch.testing.assert_close(found[1].pred_score, torch.tensor([0.316228, 0.948683, 0.894427]))
    assert [sample.pred_label.tolist() for sample in found] == [[0, 2, 1], [1, 2, 0]]
    best = made(topk=2).predict(QUERIES)
    assert [sample.pred_label.tolist() for sample in best] == [[0, 2], [1, 2]]
    assert best[0].pred_score.shape == (3,)
    assert made(topk=9).predict(QUERIES)[0].pred_label.shape == (3,)


def test_cosines_are_those_of_torch() -> None:
    a, b = torch.rand(5, 7, dtype=torch.float64), torch.rand(4, 7, dtype=torch.float64)
    similarity, order = made(b).matching(a)
    expected = torch.cosine_similarity(a[:, None], b[None], dim=-1)
    torch.testing.assert_close(similarity, expected)
    assert torch.equal(order, expected.argsort(1, descending=True))


def distance(a: Tensor, b: Tensor) -> Tensor:
    return -torch.cdist(a, b)


def test_a_similarity_of_ones_own() -> None:
    for given in (distance, "torch.cdist"):
        similarity = made(similarity_fn=given).matching(QUERIES)[0]
        torch.testing.assert_close(similarity.abs(), torch.cdist(QUERIES, PROTOTYPES))
    for wrong in ("cosine", 5):
        with pytest.raises(
            ValueError, match=r"similarity_fn=.* must be 'cosine_similarity', a function, or the import"
        ):
            made(similarity_fn=wrong)
    with pytest.raises(ValueError, match=r"similarity_fn gives the shape \(2,\)"):
        made(similarity_fn=lambda a, b: a[:, 0]).predict(QUERIES)


@pytest.mark.parametrize("batch_size", [2, 3])
def test_the_prototype_of_a_loader_has_the_rows_that_samples_name(batch_size: int) -> None:
    def batch(items: list[Any]) -> dict[str, Any]:
        return {"inputs": torch.stack([item[0] for item in items]), "data_samples": [item[1] for item in items]}

    for prototype in (
        DataLoader(Rows(), batch_size, collate_fn=batch),
        {"dataset": Rows(), "batch_size": batch_size},
        DataLoader(PROTOTYPES, batch_size),
    ):
        model = made(prototype)
        assert model.prototype_vecs is None
        assert [sample.pred_label.tolist() for sample in model.predict(QUERIES)] == [[0, 2, 1], [1, 2, 0]]
        assert torch.equal(model.prototype_vecs, PROTOTYPES)


def test_a_described_data_set_is_embedded() -> None:
    description = {"dataset": {"type": f"{__name__}.Images"}, "batch_size": 2}
    model = made(description, image_encoder=ENCODER).eval()
    images = torch.stack([Images()[index][0] for index in range(5)])
    found = model.predict_step(images, 0)
    assert [sample.pred_label[0].item() for sample in found] == [0, 1, 2, 3, 4]
    torch.testing.assert_close(found[3].pred_score[3], torch.tensor(1.0))
    assert model.hparams["prototype"] == description


def test_a_folder_is_taken_in_the_order_of_its_paths(tmp_path: Path) -> None:
    from widefield.images import open_image

    folder, _ = write_folder(tmp_path, count=3, side=40)
    (folder / "more").mkdir()
    (folder / "im1.tif").rename(folder / "more" / "a.tif")
    model = made(str(folder), image_encoder=ENCODER).eval()
    files = [folder / "im0.tif", folder / "im2.tif", folder / "more" / "a.tif"]
    found = [model.predict_step(([open_image(file)], [DataSample()]), 0)[0] for file in files]
    assert [sample.pred_label[0].item() for sample in found] == [0, 1, 2]


def test_features_that_were_saved_rank_alike(tmp_path: Path) -> None:
    model = made(DataLoader(Images(), 2), image_encoder=ENCODER).eval()
    query = torch.rand(2, 3, 32, 32)
    before = model.predict(query)
    model.dump_prototype(tmp_path / "features.pth")
    again = made(str(tmp_path / "features.pth"), image_encoder=ENCODER).eval()
    again.load_state_dict(model.state_dict())
    for one, other in zip(before, again.predict(query), strict=True):
        assert torch.equal(one.pred_label, other.pred_label)
    assert not any("prototype" in key for key in model.state_dict())


def test_training_makes_features_anew_and_leaves_the_mode_alone() -> None:
    model = made(DataLoader(Images(), 2), image_encoder=ENCODER)
    model.train()
    model.predict(torch.rand(1, 3, 32, 32))
    assert model.training
    model.eval().predict(torch.rand(1, 3, 32, 32))
    before = model.prototype_vecs
    statistics = copy.deepcopy(model.state_dict())
    model.train()
    with torch.no_grad():
        model.image_encoder[0].conv1.weight.mul_(-1)
    model.eval().predict(torch.rand(1, 3, 32, 32))
    assert not torch.equal(model.prototype_vecs, before)
    assert torch.equal(
        model.state_dict()["image_encoder.0.bn1.running_mean"], statistics["image_encoder.0.bn1.running_mean"]
    )


def test_a_retriever_with_a_head_trains_and_loads(tmp_path: Path) -> None:
    from lightning.pytorch import Trainer

    head = {"type": "LinearClsHead", "num_classes": 2, "in_channels": 8}
    model = made({"dataset": {"type": f"{__name__}.Images"}}, image_encoder=ENCODER, head=head)
    model.init_weights()
    shown = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(max_steps=2, max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **shown)
    trainer.fit(model, DataLoader(Images(), 2))
    assert trainer.global_step == 2
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True).eval()
    query = torch.rand(2, 3, 32, 32)
    for one, other in zip(model.eval().predict(query), loaded.predict(query), strict=True):
        assert torch.equal(one.pred_score, other.pred_score)


def test_a_streamed_encoder_takes_images_of_any_size() -> None:
    convnext = {"type": "ConvNeXt", "arch": {"depths": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}, "out_indices": [0]}
    convnext |= {"gap_before_final_norm": False, "streaming": {"tile_size": 32}}
    collection = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((48, 64), (64, 32))]
    loader = DataLoader([Lazy(image) for image in collection], 2, collate_fn=lambda items: {"inputs": items})
    model = made(loader, image_encoder=[convnext, ENCODER[1]]).eval()
    found = model.predict_step({"inputs": [Lazy(image) for image in collection]}, 0)
    assert [sample.pred_label[0].item() for sample in found] == [0, 1]


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match="prototype=5 must be a data loader"):
            made(5)
    with pytest.raises(ValueError, match="has no dataset"):
        made({"batch_size": 2})
    with pytest.raises(
        ValueError, match=r"prototype\.batchsize: a data loader has no 'batchsize'; did you mean batch_size"
    ):
        made({"dataset": {"type": "ImageFolder", "root": "."}, "batchsize": 2})
    with pytest.raises(
        ValueError, match=r"prototype\.dataset: no dataset named 'ImageFoldr'; did you mean ImageFolder"
    ):
        made({"dataset": {"type": "ImageFoldr"}})
    with pytest.raises(FileNotFoundError, match="does not exist"):
        made(str(tmp_path / "gone")).setup("fit")
    with pytest.raises(FileNotFoundError, match="does not exist; give a folder of images"):
        made(str(tmp_path / "gone")).predict(QUERIES)
    with pytest.raises(ValueError, match="the prototype has no images"):
        made(str(tmp_path)).predict(QUERIES)
    with pytest.raises(ValueError, match=r"the prototype holds a tensor of shape \(3,\)"):
        made(torch.ones(3)).predict(QUERIES)
    with pytest.raises(ValueError, match="the encoder gives 2 channels, and the prototype has 4"):
        made(torch.ones(3, 4)).predict(QUERIES)
    with pytest.raises(ValueError, match="end image_encoder with a neck such as"):
        made(image_encoder=ENCODER[0])(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="topk=0 must be positive"):
        made(topk=0)
    with pytest.raises(ValueError, match="this retriever has no head"):
        made()(QUERIES, mode="loss")
    with pytest.raises(RuntimeError, match='Invalid mode "unknown"'):
        made()(QUERIES, mode="unknown")


@pytest.mark.parametrize("head", [None, {"type": "LinearClsHead", "num_classes": 3, "in_channels": 2}])
def test_the_metrics_are_those_of_what_is_retrieved_whatever_the_head_says(head: Any) -> None:
    loader = DataLoader([(QUERIES[0], 0), (QUERIES[1], 2)], batch_size=2)  # type: ignore[arg-type]
    evaluation = Evaluation([METRICS.build({"type": "RetrievalRecall", "topk": 1})])
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(**options, callbacks=[evaluation]).test(made(head=head), loader, verbose=False)
    assert evaluation.results["retrieval/Recall@1"] == 50
