"""Metrics of validation and test, and batches for every kind of model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from tests.inference.small_runs import CLASSIFIER
from tests.small_images import write_image
from widefield.cli.evaluate import evaluate
from widefield.components.metrics import METRICS
from widefield.config import Config
from widefield.data import Datasets
from widefield.inference import Evaluation
from widefield.registry import MODELS

VIT = {"embed_dims": 16, "num_layers": 1, "num_heads": 2, "feedforward_channels": 16}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images, with one class each in `one.txt` and with any number of them in `several.txt`."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for k in range(6):
        write_image(folder / f"{k}.png", generator.integers(0, 255, (32, 32, 3), np.uint8))
    (folder / "one.txt").write_text("\n".join(f"{k}.png {k % 3}" for k in range(6)))
    several = ["0", "0,1", "-", "2", "1,2", "0,1,2"]
    (folder / "several.txt").write_text("\n".join(f"{k}.png {labels}" for k, labels in enumerate(several)))
    return folder


def batches(folder: Path, file: str, **options: Any) -> Datasets:
    described = {"type": "AnnotationFile", "root": folder, "ann_file": file, **options}
    return Datasets(train=described, val=described, test=described, batch_size=4)


def evaluated(model: Any, data_module: Datasets, metrics: list[dict[str, Any]], **options: Any) -> dict[str, Tensor]:
    evaluation = Evaluation([METRICS.build(metric) for metric in metrics])
    trainer = Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[evaluation],
        **options,
    )
    (logged,) = trainer.test(model, data_module, verbose=False)
    scalars = {f"test_{name}": float(value) for name, value in evaluation.results.items() if value.ndim == 0}
    assert scalars.items() <= {name: pytest.approx(value) for name, value in logged.items()}.items()
    return evaluation.results


def test_metrics_are_of_the_predictions_and_the_backbone_runs_once(images: Path) -> None:
    torch.manual_seed(0)
    model = MODELS.build({**CLASSIFIER, "head": {**CLASSIFIER["head"], "num_classes": 3}})
    runs: list[int] = []
    model.backbone.register_forward_hook(lambda part, given, output: runs.append(len(given[0])))
    metrics: list[dict[str, Any]] = [
        {"type": "Accuracy", "topk": [1, 2]},
        {"type": "SingleLabelMetric"},
        {"type": "ConfusionMatrix"},
        {"type": "AveragePrecision"},
    ]
    data_module = batches(images, "one.txt")
    found = evaluated(model, data_module, metrics)
    assert runs == [4, 2]
    pictures = torch.stack([torch.as_tensor(picture.read(0, 0, 32, 32)) for picture, _ in data_module.test_set])
    scores = model.eval()(pictures / 255).softmax(1).detach()
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    for metric in metrics:
        made = METRICS.build(metric)
        made.update(scores, torch.eye(3).long()[target] if metric["type"] == "AveragePrecision" else target)
        for name, value in made.compute().items():
            torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-3)


def test_images_of_several_labels_are_compared_class_by_class(images: Path) -> None:
    torch.manual_seed(0)
    head = {"type": "MultiLabelLinearClsHead", "num_classes": 3, "in_channels": 8}
    model = MODELS.build({**CLASSIFIER, "head": head})
    data_module = batches(images, "several.txt", multi_label=True)
    found = evaluated(model, data_module, [{"type": "MultiLabelMetric", "items": ["support"], "average": None}])
    assert found["multi-label/support_classwise"].tolist() == [3, 3, 3]


def test_the_accuracy_of_a_multi_label_head_takes_images_of_one_label(images: Path) -> None:
    head = {"type": "MultiLabelLinearClsHead", "num_classes": 3, "in_channels": 8}
    loss = {"type": "CrossEntropyLoss", "use_soft": True}  # as recipes with Mixup have it
    model = MODELS.build({**CLASSIFIER, "head": {**head, "loss": loss}})
    found = evaluated(model, batches(images, "one.txt"), [{"type": "Accuracy"}])
    assert 0 <= found["accuracy/top1"] <= 100


def test_metrics_are_computed_in_the_precision_of_the_trainer(images: Path) -> None:
    torch.manual_seed(0)
    model = MODELS.build({**CLASSIFIER, "head": {**CLASSIFIER["head"], "num_classes": 3}})
    found = evaluated(model, batches(images, "one.txt"), [{"type": "Accuracy"}], precision="bf16-mixed")
    assert 0 <= found["accuracy/top1"] <= 100


def test_self_supervised_models_take_views_and_masks_of_data_sets(images: Path) -> None:
    torch.manual_seed(0)
    crop = {"type": "RandomResizedCrop", "size": 32}
    simclr = MODELS.build(
        {
            "type": "SimCLR",
            "backbone": CLASSIFIER["backbone"],
            "neck": {"type": "NonLinearNeck", "in_channels": 8, "hid_channels": 8, "out_channels": 4},
            "head": {"type": "ContrastiveHead"},
        }
    )
    mae = MODELS.build(
        {
            "type": "MAE",
            "backbone": {"type": "MAEViT", "arch": VIT, "img_size": 32, "patch_size": 16},
            "neck": {
                "type": "MAEPretrainDecoder",
                "num_patches": 4,
                "embed_dim": 16,
                "decoder_embed_dim": 16,
                "decoder_depth": 1,
                "decoder_num_heads": 2,
            },
            "head": {"type": "MAEPretrainHead", "loss": {"type": "PixelReconstructionLoss", "criterion": "L2"}},
        }
    )
    maskfeat = MODELS.build(
        {
            "type": "MaskFeat",
            "backbone": {"type": "MaskFeatViT", "arch": VIT, "img_size": 32, "patch_size": 16},
            "neck": {"type": "LinearNeck", "in_channels": 16, "out_channels": 108},
            "head": {"type": "MIMHead", "loss": {"type": "PixelReconstructionLoss", "criterion": "L2"}},
            "target_generator": {"type": "HOGGenerator"},
        }
    )
    mask = {"type": "BEiTMaskGenerator", "input_size": 2, "num_masking_patches": 2, "min_num_patches": 1}
    for model, options in (
        (simclr, {"transforms": [{"type": "MultiView", "transforms": [crop]}]}),
        (mae, {"transforms": [crop]}),
        (maskfeat, {"transforms": [crop], "mask_generator": mask}),
    ):
        model.log_dict = lambda *_, **__: None
        batch = next(iter(batches(images, "one.txt", **options).train_dataloader()))
        loss = model.training_step(batch, 0)
        assert loss.isfinite()
        loss.backward()


def test_a_checkpoint_of_theirs_with_the_classes_in_another_order_is_refused(images: Path, tmp_path: Path) -> None:
    names = ["cat", "dog", "owl"]
    described = {"type": "AnnotationFile", "root": str(images), "ann_file": str(images / "one.txt")}
    model = {**CLASSIFIER, "head": {**CLASSIFIER["head"], "num_classes": 3}}
    config = Config({"model": model, "data": {"type": "Datasets", "val": {**described, "class_names": names}}})
    weights = MODELS.build(model).state_dict()
    torch.save({"state_dict": weights, "meta": {"dataset_meta": {"classes": names[::-1]}}}, tmp_path / "epoch_1.pth")
    with pytest.raises(ValueError, match="the classes are owl, dog, cat, and those of the data sets are cat, dog, owl"):
        evaluate(config, tmp_path / "epoch_1.pth", "validate")
    torch.save({"state_dict": weights, "meta": {"CLASSES": names}}, tmp_path / "epoch_1.pth")
    assert "val_loss" in evaluate(config, tmp_path / "epoch_1.pth", "validate")
