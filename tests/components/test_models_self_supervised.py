"""Models that learn without labels."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader, Dataset

from tests.fresh import fresh
from widefield.components import DataSample
from widefield.components.models.base_model import BaseSelfSupervisor
from widefield.registry import MODELS

ARCH = {"embed_dims": 16, "num_layers": 2, "num_heads": 2, "feedforward_channels": 32}
VIT: dict[str, Any] = {"arch": ARCH, "img_size": 32, "patch_size": 8}
MASKS = {"type": "BEiTMaskGenerator", "input_size": 4, "num_masking_patches": 6, "min_num_patches": 2}
NORM = {"mean": [120.0, 110.0, 100.0], "std": [60.0, 50.0, 40.0]}
TWO_NORMS = {"type": "TwoNormDataPreprocessor", **NORM, "second_mean": 127.5, "second_std": 127.5}
L2 = {"type": "PixelReconstructionLoss", "criterion": "L2"}
CNN: dict[str, Any] = {
    "backbone": {
        "type": "ResNet",
        "depth": 18,
        "stem_channels": 4,
        "base_channels": 4,
        "num_stages": 2,
        "out_indices": [1],
    },
    "neck": {
        "type": "NonLinearNeck",
        "in_channels": 8,
        "hid_channels": 8,
        "out_channels": 6,
        "norm_cfg": {"type": "BN1d"},
    },
    "head": {"type": "ContrastiveHead", "temperature": 0.2},
}
MODEL: dict[str, dict[str, Any]] = {
    "MAE": {
        "type": "MAE",
        "backbone": {"type": "MAEViT", **VIT},
        "neck": {
            "type": "MAEPretrainDecoder",
            "num_patches": 16,
            "patch_size": 8,
            "embed_dim": 16,
            "decoder_embed_dim": 16,
            "decoder_depth": 1,
            "decoder_num_heads": 2,
        },
        "head": {"type": "MAEPretrainHead", "norm_pix": True, "patch_size": 8, "loss": L2},
    },
    "BEiT v1": {
        "type": "BEiT",
        "backbone": {"type": "BEiTPretrainViT", **VIT},
        "head": {"type": "BEiTV1Head", "embed_dims": 16, "num_embed": 12, "loss": {"type": "CrossEntropyLoss"}},
        "target_generator": {
            "type": "DALLEEncoder",
            "n_hid": 4,
            "n_blk_per_group": 1,
            "vocab_size": 12,
            "allow_random_weights": True,
        },
        "data_preprocessor": {**TWO_NORMS, "second_mean": -31.875, "second_std": 318.75},
    },
    "BEiT v2": {
        "type": "BEiT",
        "backbone": {"type": "BEiTPretrainViT", **VIT, "out_indices": [0, 1]},
        "neck": {"type": "BEiTV2Neck", "num_layers": 1, "early_layers": 1, "backbone_arch": ARCH},
        "head": {"type": "BEiTV2Head", "embed_dims": 16, "num_embed": 12, "loss": {"type": "CrossEntropyLoss"}},
        "target_generator": {
            "type": "VQKD",
            "encoder_config": {"type": "BEiTViT", **VIT, "out_type": "featmap"},
            "num_embed": 12,
            "embed_dims": 4,
            "allow_random_weights": True,
        },
        "mask_generator": MASKS,
        "data_preprocessor": TWO_NORMS,
    },
    "MaskFeat": {
        "type": "MaskFeat",
        "backbone": {"type": "MaskFeatViT", **VIT},
        "neck": {"type": "LinearNeck", "in_channels": 16, "out_channels": 27, "norm_cfg": None},
        "head": {"type": "MIMHead", "loss": L2},
        "target_generator": {"type": "HOGGenerator", "gaussian_window": 8, "patch_size": 8},
        "mask_generator": {"type": "RandomMaskGenerator", "input_size": 4},
        "data_preprocessor": NORM,
    },
    "SimCLR": {"type": "SimCLR", **CNN, "data_preprocessor": NORM},
    "MoCo": {"type": "MoCo", **CNN, "queue_len": 6, "feat_dim": 6, "momentum": 0.25},
}
VIEWS = ("SimCLR", "MoCo", "BEiT v1")


def made(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = MODELS.build({**MODEL[name], **changes})
    model.init_weights()
    return model


class Pictures(Dataset):
    """Pairs of pictures (or two of them) and samples with the mask that v1 needs; its second picture has the side 32 / 8 * 8."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Any, DataSample]:
        generator = torch.Generator().manual_seed(index)
        views = [torch.randint(0, 256, (3, 32, 32), generator=generator, dtype=torch.uint8) for _ in range(2)]
        sample = DataSample().set_gt_label(0)
        if self.name == "BEiT v1":
            sample.set_mask(torch.eye(4))
        return (views if self.name in VIEWS else views[0]), sample


def collate(items: list[Any]) -> dict[str, Any]:
    inputs = [item[0] for item in items]
    views = [torch.stack(view) for view in zip(*inputs, strict=True)] if isinstance(inputs[0], list) else None
    return {"inputs": views or torch.stack(inputs), "data_samples": [item[1] for item in items]}


def fitted(model: Any, loader: DataLoader, folder: Path) -> Trainer:
    shown = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(max_epochs=1, default_root_dir=folder, accelerator="cpu", **shown)
    trainer.fit(model, loader)
    return trainer


@pytest.mark.filterwarnings(
    "ignore:Found .* in eval mode at the start of training"
)  # target generators are meant to be
@pytest.mark.parametrize("name", MODEL)
def test_two_steps_a_checkpoint_and_the_same_numbers(name: str, tmp_path: Path) -> None:
    model = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loader = DataLoader(Pictures(name), 2, collate_fn=collate)
    trainer = fitted(model, loader, tmp_path)
    assert trainer.global_step == 2
    names = {"train_loss", "train_loss_1", "train_loss_2"} if name == "BEiT v2" else {"train_loss"}
    assert set(trainer.callback_metrics) == names
    total = sum(value for key, value in trainer.callback_metrics.items() if key != "train_loss")
    if name == "BEiT v2":
        torch.testing.assert_close(trainer.callback_metrics["train_loss"], total)
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {"backbone", "head" if "BEiT" in name else "neck"} <= changed
    assert "target_generator" not in changed

    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    batch = next(iter(loader))
    losses = []
    for one in (model, loaded):
        one.train()
        torch.manual_seed(1)
        losses.append(one.loss(*one.preprocess(batch, training=True)))
    assert {key: value.item() for key, value in losses[0].items()} == {
        key: value.item() for key, value in losses[1].items()
    }


def test_features_are_those_of_whole_images() -> None:
    image = torch.rand(2, 3, 32, 32)
    assert made("MAE")(image)[-1].shape == (2, 17, 16)
    assert made("MaskFeat")(image)[-1].shape == (2, 17, 16)
    assert made("BEiT v1")(image)[-1].shape == (2, 17, 16)
    assert made("SimCLR")(image)[-1].shape == (2, 8, 4, 4)
    with pytest.raises(RuntimeError, match='Invalid mode "predict"'):
        made("MAE")(image, mode="predict")


def test_the_loss_of_mae_is_the_mean_square_over_removed_patches() -> None:
    model = made("MAE").double()
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(3)
    loss = model(image, mode="loss")["loss"]
    torch.manual_seed(3)
    latent, mask, ids_restore = model.backbone(image)
    predicted = model.neck(latent, ids_restore)
    expected = []
    for n in range(2):
        for patch in range(16):
            if mask[n, patch] == 1:
                y, x = 8 * (patch // 4), 8 * (patch % 4)
                target = image[n, :, y : y + 8, x : x + 8].permute(1, 2, 0).flatten()
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                expected.append(((predicted[n, patch] - target) ** 2).mean())
    assert len(expected) == 2 * 12
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_the_loss_of_maskfeat_is_that_of_masked_patches_without_the_class_token() -> None:
    model = made("MaskFeat", mask_generator=None).double()
    image = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    masks = torch.randint(0, 2, (2, 4, 4))
    samples = [DataSample().set_mask(mask) for mask in masks]
    predicted = model.neck(model.backbone(image, masks))[0][:, 1:]
    target = model.target_generator(image)
    chosen = masks.flatten(1).bool()
    expected = ((predicted - target) ** 2)[chosen].mean()
    torch.testing.assert_close(model(image, samples, mode="loss")["loss"], expected)


def test_beit_sees_one_view_and_its_target_another() -> None:
    model = made("BEiT v1").double()
    views = [torch.rand(2, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    masks = torch.eye(4).expand(2, 4, 4)
    samples = [DataSample().set_mask(mask) for mask in masks]
    scores = model.head.cls_head(model.backbone(views[0], masks)[-1][:, 1:])
    tokens = model.target_generator(views[1]).argmax(1).flatten(1)
    chosen = masks.flatten(1).bool()
    expected = nn.functional.cross_entropy(scores[chosen], tokens[chosen])
    torch.testing.assert_close(model.loss(views, samples)["loss"], expected)
    assert set(made("BEiT v2").loss([view.float() for view in views], ())) == {"loss_1", "loss_2"}


def test_what_a_model_needs_is_said() -> None:
    image = torch.rand(2, 3, 32, 32)
    with pytest.raises(ValueError, match="give the model a mask_generator such as"):
        made("MaskFeat", mask_generator=None)(image, [DataSample(), DataSample()], mode="loss")
    with pytest.raises(ValueError, match="TwoNormDataPreprocessor"):
        made("BEiT v1").loss(image, [])
    with pytest.raises(ValueError, match="MAE needs a neck"):
        made("MAE", neck=None)(image, mode="loss")
    for name in ("SimCLR", "MoCo"):
        with pytest.raises(ValueError, match=r"a tensor of shape \(2, 3, 32, 32\); give a list \[view 1, view 2\]"):
            made(name).loss(image, [])
    with pytest.raises(ValueError, match="second_mean and second_std are missing"):
        made("BEiT v1", data_preprocessor={"type": "TwoNormDataPreprocessor", **NORM})
    with pytest.raises(ValueError, match="there are 3 views"):
        made("BEiT v1").preprocess({"inputs": [image] * 3})


def normalised(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True)


def test_the_loss_of_simclr_is_nt_xent() -> None:
    model = made("SimCLR").double().eval()
    views = [torch.rand(3, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    z = normalised(model.neck(model.backbone(torch.cat(views)))[0])
    terms = []
    for i in range(6):
        j = (i + 3) % 6
        others = sum(torch.exp(z[i] @ z[k] / 0.2) for k in range(6) if k != i)
        terms.append(-torch.log(torch.exp(z[i] @ z[j] / 0.2) / others))
    torch.testing.assert_close(model.loss(views, [])["loss"], torch.stack(terms).mean())


def test_moco_is_infonce_against_its_queue_and_follows_slowly() -> None:
    model = made("MoCo").double()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(0.1)
    views = [torch.rand(4, 3, 32, 32, dtype=torch.float64) for _ in range(2)]
    queue = model.queue.clone()
    moved = [
        0.75 * mine + 0.25 * other
        for mine, other in zip(
            model.encoder_k.parameters(), [*model.backbone.parameters(), *model.neck.parameters()], strict=True
        )
    ]
    follower = copy.deepcopy(model.encoder_k)
    for mine, new in zip(follower.parameters(), moved, strict=True):
        mine.data.copy_(new)
    query = normalised(copy.deepcopy(model.neck)(copy.deepcopy(model.backbone)(views[0]))[0])
    key = normalised(follower(views[1])[0])
    terms = []
    for n in range(4):
        negatives = sum(torch.exp(query[n] @ queue[:, k] / 0.2) for k in range(6))
        positive = torch.exp(query[n] @ key[n] / 0.2)
        terms.append(-torch.log(positive / (positive + negatives)))
    loss = model.loss(views, [])["loss"]
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    for mine, new in zip(model.encoder_k.parameters(), moved, strict=True):
        torch.testing.assert_close(mine, new)
        assert not mine.requires_grad
    torch.testing.assert_close(model.queue, torch.cat([key.T, queue[:, 4:]], dim=1))
    assert model.queue_ptr.tolist() == [4]
    loss.backward()  # the queue has changed since, and the gradient is that of the one before
    model.loss(views, [])
    assert model.queue_ptr.tolist() == [2]
    assert "queue" in model.state_dict()

    model.eval()
    before = copy.deepcopy(model.state_dict())
    model.loss(views, [])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="a batch has 8 keys, and the queue 6"):
        model.train().loss([torch.cat([view, view]) for view in views], [])
    with pytest.raises(ValueError, match="the neck gives 6 channels, and feat_dim=5"):
        made("MoCo", feat_dim=5).loss([view.float() for view in views], [])


def test_the_key_encoder_begins_as_a_copy() -> None:
    model = made("MoCo")
    query = [*model.backbone.parameters(), *model.neck.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(model.encoder_k.parameters(), query, strict=True))
    assert torch.allclose(model.queue.norm(dim=0), torch.ones(6))


class Flat(nn.Module):
    def __init__(self, in_features: int = 12, out_features: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, out_features)

    def forward(self, x: Any) -> tuple[Tensor]:
        return (self.fc((x[-1] if isinstance(x, tuple) else x).flatten(1)),)


def flat_model(name: str) -> Any:
    torch.manual_seed(0)
    options = {"queue_len": 10, "feat_dim": 3} if name == "MoCo" else {}
    parts = {"backbone": Flat(), "neck": Flat(5, 3), "head": {"type": "ContrastiveHead"}}
    return MODELS.build({"type": name, **parts, **options}).double()


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def one_of_two(rank: int, store: str, views: list[Tensor], expected: dict[str, tuple[Tensor, Any]]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    for name, (gradient, queue) in expected.items():
        model = flat_model(name)
        model.loss([view.chunk(2)[rank] for view in views], [])["loss"].backward()
        mean = gradients(model)
        dist.all_reduce(mean)
        torch.testing.assert_close(mean / 2, gradient)
        if name == "MoCo":
            torch.testing.assert_close(model.queue, queue)
            assert model.queue_ptr.tolist() == [4]
    dist.destroy_process_group()


@pytest.mark.slow
@fresh
def test_two_processes_have_the_gradients_and_the_queue_of_one(tmp_path: Path) -> None:
    torch.manual_seed(5)
    views = [torch.rand(4, 3, 2, 2, dtype=torch.float64) for _ in range(2)]
    expected = {}
    for name in ("SimCLR", "MoCo"):
        model = flat_model(name)
        model.loss(views, [])["loss"].backward()
        expected[name] = (gradients(model), getattr(model, "queue", None))
    start_processes(one_of_two, (str(tmp_path / "store"), views, expected), nprocs=2, start_method="fork")


class NewAlgorithm(BaseSelfSupervisor):
    def __init__(self, backbone, neck=None, head=None, init_cfg=None):
        super().__init__(backbone=backbone, neck=neck, head=head, init_cfg=init_cfg)

    def extract_feat(self, inputs, **kwargs):
        return self.backbone(inputs)

    def loss(self, inputs, data_samples, **kwargs):
        return {"loss": self.extract_feat(inputs)[-1].square().mean()}


def test_a_new_algorithm_trains_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODELS, "_registered", dict(MODELS._registered))  # forgets it
    MODELS.register_module()(NewAlgorithm)
    parts = {"backbone": CNN["backbone"], "neck": {"type": "GlobalAveragePooling"}}
    model = MODELS.build({"type": "NewAlgorithm", **parts, "init_cfg": {"type": "Kaiming", "layer": "Conv2d"}})
    assert (model.with_neck, model.with_head, model.with_target_generator) == (True, False, False)
    model.init_weights()
    trainer = fitted(model, DataLoader(torch.rand(4, 3, 16, 16), 2), tmp_path)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    loaded = NewAlgorithm.load_from_checkpoint(tmp_path / "mine.ckpt", weights_only=True)
    assert dict(loaded.hparams) == {**parts, "head": None, "init_cfg": {"type": "Kaiming", "layer": "Conv2d"}}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_the_base_class_says_how_its_parts_are_handed_on() -> None:
    class Printed(BaseSelfSupervisor):
        def __init__(self, backbone, neck=None, head=None, init_cfg=None):
            super().__init__(init_cfg)

    with pytest.raises(ValueError, match=r"Printed has no backbone; .* super\(\).__init__\(backbone=backbone"):
        Printed(CNN["backbone"])


def test_parts_that_were_made_already_are_given_again_when_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    model = made("MAE", backbone=MODELS.build(MODEL["MAE"]["backbone"]))
    assert "backbone" not in model.hparams
    torch.save(
        {
            "state_dict": model.state_dict(),
            "hyper_parameters": dict(model.hparams),
            "pytorch-lightning_version": "2.5.0",
        },
        tmp_path / "model.ckpt",
    )
    backbone = MODELS.build(MODEL["MAE"]["backbone"])
    loaded = type(model).load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True, backbone=backbone)
    assert loaded.backbone is backbone
    assert loaded.head.norm_pix


def test_layers_have_the_depth_that_the_backbone_says() -> None:
    assert made("MAE").get_layer_depth("backbone.layers.0.ln1.weight") == (1, 4)
    assert made("MAE").get_layer_depth("neck.mask_token") == (3, 4)
    with pytest.raises(NotImplementedError, match="ResNet does not say"):
        made("SimCLR").get_layer_depth("backbone.conv1.weight")
