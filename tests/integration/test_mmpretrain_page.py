"""The code blocks of MMPretrain's page "Customize Models" do what they are meant to, where the page is at hand.

Every change of what is printed is in `IMPORTS`, `DEFECTS` and `LEFT_OUT`. The files of the page become a package of the user's,
with the page's lines in its `__init__.py`; its configurations become files that are based on each other. What the page shows is
also tested in words of our own, without the page, in tests/components and tests/config.
"""

import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from tests.small_images import write_folder
from widefield.cli import main
from widefield.cli.sections import SECTIONS
from widefield.config import build, check_config, load, override
from widefield.registry import MODELS

PAGE = Path(__file__).parents[3] / "shared" / "reference" / "mmpretrain-customize-models.md"
pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="the page is no part of the project")

Replacements = list[tuple[str, str]]

NEW_ALGORITHM, CIFAR, MAE_VIT, POOLING, VIT_HEAD, MAE_HEAD, L1 = 0, 3, 6, 7, 10, 13, 14
FILES = {
    NEW_ALGORITHM: "new_algorithm",
    CIFAR: "resnet_cifar",
    MAE_VIT: "mae_vit",
    POOLING: "gap",
    VIT_HEAD: "vit_head",
    MAE_HEAD: "mae_head",
    L1: "l1_loss",
}
"""Blocks that are Python files, and the names that the page gives them; it names none for the two of masked autoencoders."""
INITS = (1, 4, 8, 11, 15)
"""Blocks of `__init__.py`: as printed, an Ellipsis in `__all__` and all."""
ALGORITHM_CONFIG, CIFAR_CONFIG, NECK_CONFIG, HEAD_CONFIG, LOSS_CONFIG, WHOLE_CONFIG = 2, 5, 9, 12, 16, 17

IMPORTS: dict[int, Replacements] = {
    NEW_ALGORITHM: [("from .base import", "from widefield.components import")],
    CIFAR: [("from .resnet import", "from widefield.components import")],
    VIT_HEAD: [("from .cls_head import", "from widefield.components import")],
    MAE_HEAD: [("from mmengine.model import", "from widefield.components import")],
    L1: [("from .utils import", "from widefield.components import")],
    # The page prints the class alone, without imports and without the decorator.
    MAE_VIT: [
        (
            "class MAEViT(VisionTransformer):",
            "from typing import Optional, Tuple\n\nimport torch\n\nfrom widefield.components import VisionTransformer\n"
            "from widefield.registry import MODELS\n\n\n@MODELS.register_module()\nclass MAEViT(VisionTransformer):",
        )
    ],
}
"""Beside `mmpretrain.registry`, which is `widefield.registry` in all of them."""

DEFECTS: dict[int, dict[int, Replacements]] = {
    # 1. The base class is called BaseSelfSupervisor.
    1: {NEW_ALGORITHM: [("BaseSelfSupvisor", "BaseSelfSupervisor")]},
    # 2. init_cfg would become the first argument of the base class, its backbone.
    2: {
        NEW_ALGORITHM: [
            ("__init__(init_cfg)", "__init__(backbone=backbone, neck=neck, head=head, init_cfg=init_cfg)"),
        ]
    },
    # 3. A module assigns its parts before torch has prepared it for parts.
    3: {POOLING: [("def __init__(self):\n", "def __init__(self):\n        super().__init__()\n")]},
    # 4. The constructor has no self, and `mask is None or False` is `mask is None`.
    4: {MAE_VIT: [("def __init__(mask_ratio", "def __init__(self, mask_ratio"), ("mask is None or False", "not mask")]},
    # 5. Two functions are not imported, and the page's configuration gives no deep_stem. `self.init_cfg['type']` needs no change:
    #    `init_cfg` stays what was given, None if nothing was, and never becomes the list of the class.
    5: {
        CIFAR: [
            ("import ResNet\n", "import ResNet, build_conv_layer, build_norm_layer\n"),
            ("depth, deep_stem, **kwargs", "depth, deep_stem=False, **kwargs"),
        ]
    },
    # 6. The backbone gives the class token, not a pair with the patches.
    6: {VIT_HEAD: [("_, cls_token = feat", "cls_token = feat")]},
    # 7. A mask of patches (B, L) as the weight of values (B, L, C): weights of the first axes are taken as such, no change.
    7: {},
    # 8. The page's own L1Loss compares scores with class indices; the data preprocessor makes scores of these. Widefield's L1Loss
    #    takes class indices, and there the configuration works as printed.
    8: {
        WHOLE_CONFIG: [
            (
                "topk=(1, 5),\n    ))",
                "topk=(1, 5),\n    ),\n    data_preprocessor=dict(type='ClsDataPreprocessor', to_onehot=True))",
            )
        ]
    },
    # 9. The mean with avg_factor, the number of images, is a sum over classes: so it is, and so it is documented, no change.
    9: {},
}
"""The nine faults of the page: what it has, and what it must be."""

_RESNET = "dict(type='ResNet_CIFAR', depth=18, stem_channels=4, base_channels=4)"
LEFT_OUT: dict[int, Replacements] = {
    NEW_ALGORITHM: [
        (
            "def extract_feat(self, inputs, **kwargs):\n        pass",
            "def extract_feat(self, inputs, **kwargs):\n        return self.backbone(inputs)",
        ),
        (
            "def loss(self, inputs, data_samples, **kwargs):\n        pass",
            "def loss(self, inputs, data_samples, **kwargs):\n"
            "        return self.head.loss(self.neck(self.extract_feat(inputs)), data_samples)",
        ),
    ],
    # "we regard inputs as tensor for simplicity", and backbones give tuples, as the page says where it explains them.
    POOLING: [
        ("self.gap(inputs)", "self.gap(inputs[-1])"),
        ("inputs.size(0)", "inputs[-1].size(0)"),
        ("return outs", "return (outs,)"),
    ],
    MAE_VIT: [
        (
            '"""Generate the mask for MAE Pre-training."""\n        pass',
            "from widefield.components.backbones.mae_vit import MAEViT as Ours\n"
            "        return Ours.random_masking(self, x, mask_ratio)",
        )
    ],
    ALGORITHM_CONFIG: [
        ("backbone=...", f"backbone={_RESNET}"),
        ("neck=...", "neck=dict(type='GlobalAveragePooling')"),
        ("head=...,\n    ...", "head=dict(type='LinearClsHead', num_classes=10, in_channels=32)"),
    ],
    CIFAR_CONFIG: [("    ...\n    backbone", "    backbone"), ("depth=18,\n        ...),\n    ...", "depth=18))")],
    HEAD_CONFIG: [("...", "num_classes=10, in_channels=16, hidden_dim=8")],
}
"""What the page leaves to its readers."""


def blocks() -> list[str]:
    found = re.findall(r"^( *)```python\n(.*?)^\1```", PAGE.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [textwrap.dedent(code) for _, code in found]


def repaired(number: int, but: int | None = None) -> str:
    """A block with all that is replaced in it, `but` one of the defects."""
    code = blocks()[number].replace("from mmpretrain.registry import", "from widefield.registry import")
    repairs = [one for defect, changes in DEFECTS.items() if defect != but for one in changes.get(number, [])]
    for old, new in [*IMPORTS.get(number, []), *repairs, *LEFT_OUT.get(number, [])]:
        assert old in code, f"the page has no {old!r}"
        code = code.replace(old, new)
    return code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the package `my_models`, and with configurations; the user's components are forgotten behind the test."""
    monkeypatch.setattr(MODELS, "_registered", dict(MODELS._registered))
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_models"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    write_page(tmp_path)
    return tmp_path


def write_page(folder: Path, but: int | None = None) -> None:
    """Write the page's files and configurations, and two of ours in its style, with all defects repaired `but` one."""
    package = folder / "my_models"
    package.mkdir(exist_ok=True)
    for number, name in FILES.items():
        (package / f"{name}.py").write_text(repaired(number, but))
    named = "\n".join(repaired(number) for number in INITS)
    (package / "__init__.py").write_text(f"{named}\nfrom . import mae_head, mae_vit\n")
    for number, name in {WHOLE_CONFIG: "whole", ALGORITHM_CONFIG: "algorithm"}.items():
        (folder / f"{name}.py").write_text(repaired(number, but))
    for number, name in {CIFAR_CONFIG: "cifar", NECK_CONFIG: "neck", LOSS_CONFIG: "loss"}.items():
        (folder / f"{name}.py").write_text(f"_base_ = 'whole.py'\n{repaired(number)}")
    (folder / "vit.py").write_text(VIT)
    (folder / "head.py").write_text(f"_base_ = 'vit.py'\n{repaired(HEAD_CONFIG)}")
    (folder / "mae.py").write_text(MAE)


VIT = """\
_arch = dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16)
model = dict(
    type='ImageClassifier',
    backbone=dict(type='VisionTransformer', arch=_arch, img_size=32, patch_size=8))
"""
MAE = """\
_arch = dict(embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=16)
model = dict(
    type='MAE',
    backbone=dict(type='MAEViT', mask_ratio=0.75, arch=_arch, img_size=32, patch_size=8, out_type='raw'),
    neck=dict(type='MAEPretrainDecoder', num_patches=16, patch_size=8, embed_dim=16, decoder_embed_dim=16,
              decoder_depth=1, decoder_num_heads=2),
    head=dict(type='MAEPretrainHead', norm_pix=True, patch_size=8, loss=dict(type='L1Loss')))
"""
SMALL = ("model.backbone.stem_channels=4", "model.backbone.base_channels=4", "model.head.in_channels=32")


def built(name: str, *overrides: str) -> Any:
    """The model of a configuration, checked, with the user's components and their first weights."""
    import my_models  # noqa: F401

    config = override(load(Path(name)), overrides, SECTIONS)
    check_config(config, SECTIONS)
    torch.manual_seed(0)
    model = build(config, ("model",))
    model.init_weights()
    return model


def train_two_steps(model: Any) -> None:
    before = [parameter.clone() for parameter in model.parameters() if parameter.requires_grad]
    data = DataLoader(TensorDataset(torch.rand(4, 3, 32, 32), torch.tensor([0, 9, 2, 5])), 2)
    shown = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(max_epochs=1, accelerator="cpu", **shown)  # type: ignore[arg-type]
    trainer.fit(model, data)
    assert trainer.global_step == 2
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


def module_of(part: object) -> str:
    return type(part).__module__


def test_every_block_is_a_file_a_list_of_imports_or_a_configuration() -> None:
    configs = {ALGORITHM_CONFIG, CIFAR_CONFIG, NECK_CONFIG, HEAD_CONFIG, LOSS_CONFIG, WHOLE_CONFIG}
    assert {*FILES, *INITS} | configs == set(range(len(blocks())))
    assert len(DEFECTS) == 9


def test_the_whole_configuration_is_trained_resumed_tested_and_predicts(folder: Path) -> None:
    write_folder(folder, side=32)
    fit = ["fit", "--config", "whole.py", "--imports", "my_models", "--images", "images", "--labels", "labels.csv"]
    quiet = "trainer.enable_progress_bar=false"
    classes = ("model.head.num_classes=2", "model.head.topk=[1]")  # of the images here
    assert main([*fit, *SMALL, *classes, "--batch-size", "3", "--epochs", "1", quiet, "--out", "run"]) == 0
    assert main(["fit", "--resume", "--out", "run", "--epochs", "2"]) == 0
    assert main(["test", "--run", "run"]) == 0
    images = [str(image) for image in sorted((folder / "images").iterdir())]
    assert main(["predict", "--checkpoint", "run/last.ckpt", "--out", "predictions", *images]) == 0
    assert (folder / "predictions" / "predictions.csv").is_file()
    checkpoint = torch.load(folder / "run" / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == 1
    assert checkpoint["hyper_parameters"]["backbone"]["type"] == "ResNet_CIFAR"


def test_the_loss_of_the_whole_configuration_is_the_distance_summed_over_classes(folder: Path) -> None:
    model = built("whole.py", *SMALL)
    parts = (model.backbone, model.neck, model.head.loss_module)
    assert [module_of(part) for part in parts] == ["my_models.resnet_cifar", "my_models.gap", "my_models.l1_loss"]
    labels = torch.tensor([3, 7])
    model.eval()
    inputs, samples = model.preprocess((torch.rand(2, 3, 32, 32), labels), training=True)
    expected = (model(inputs) - torch.nn.functional.one_hot(labels, 10)).abs().sum(1).mean()
    torch.testing.assert_close(model.loss(inputs, samples)["loss"], expected)
    train_two_steps(model.train())


def test_with_widefields_loss_the_whole_configuration_takes_class_indices_as_printed(folder: Path) -> None:
    (folder / "my_models" / "l1_loss.py").write_text("from widefield.components import L1Loss\n")
    (folder / "whole.py").write_text(blocks()[WHOLE_CONFIG])
    model = built("whole.py", *SMALL)
    assert module_of(model.head.loss_module).startswith("widefield.")
    train_two_steps(model)


@pytest.mark.parametrize("name", ["cifar", "neck", "loss"])
def test_a_setting_goes_over_the_configuration_that_it_is_based_on(folder: Path, name: str) -> None:
    changed = built(f"{name}.py", *SMALL)
    assert str(changed) == str(built("whole.py", *SMALL))
    train_two_steps(changed)


def test_the_head_with_a_hidden_layer_gets_the_class_token(folder: Path) -> None:
    model = built("head.py")
    assert module_of(model.head) == "my_models.vit_head"
    assert model.extract_feat(torch.rand(2, 3, 32, 32), stage="pre_logits").shape == (2, 8)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    train_two_steps(model)


def test_the_new_algorithm_is_built_of_its_parts(folder: Path) -> None:
    model = built("algorithm.py")
    assert module_of(model) == "my_models.new_algorithm"
    assert (model.with_neck, model.with_head) == (True, True)
    assert model(torch.rand(2, 3, 32, 32))[-1].shape == (2, 32, 4, 4)
    train_two_steps(model)


def test_weights_of_a_checkpoint_stay_where_the_backbone_looks_for_them(folder: Path) -> None:
    saved = built("whole.py", *SMALL)
    torch.save(saved.state_dict(), folder / "model.pth")
    wanted = "{type: Pretrained, checkpoint: model.pth, prefix: backbone}"
    loaded = built("whole.py", *SMALL, f"model.backbone.init_cfg={wanted}")
    assert all(
        torch.equal(value, saved.backbone.state_dict()[key]) for key, value in loaded.backbone.state_dict().items()
    )
    several = "[{type: Kaiming, layer: Conv2d}, {type: Constant, val: 1, layer: BatchNorm2d}]"
    with pytest.raises(TypeError):  # the page's own line, where a list was given
        built("whole.py", *SMALL, f"model.backbone.init_cfg={several}")


def test_the_encoder_the_head_and_the_loss_of_masked_autoencoders_work_together(folder: Path) -> None:
    model = built("mae.py")
    parts = (model.backbone, model.head, model.head.loss_module)
    assert [module_of(part) for part in parts] == ["my_models.mae_vit", "my_models.mae_head", "my_models.l1_loss"]
    image = torch.rand(2, 3, 32, 32)
    latent, mask, ids_restore = model.backbone(image)
    assert (latent.shape, mask.sum(1).tolist(), ids_restore.shape) == ((2, 5, 16), [12.0, 12.0], (2, 16))
    for off in (None, False):
        assert model.backbone(image, mask=off)[-1].shape == (2, 17, 16)
    predicted = model.neck(latent, ids_restore)
    difference = (predicted - model.head.construct_target(image)).abs() * mask[:, :, None]
    torch.testing.assert_close(model.head.loss(predicted, image, mask), difference.mean())
    assert not model.backbone.pos_embed.requires_grad
    train_two_steps(model)


@pytest.mark.parametrize(
    ("defect", "config", "error"),
    [
        (1, "whole.py", "cannot import name|has no attribute 'BaseSelfSupvisor'"),
        (2, "algorithm.py", "has no backbone; a constructor of your own hands its parts on by name"),
        (3, "whole.py", "cannot assign module before"),
        (4, "mae.py", "mask_ratio"),
        (5, "whole.py", "build_conv_layer|deep_stem"),
        (6, "head.py", "too many values to unpack"),
        (8, "whole.py", "^$"),  # a bare AssertionError
    ],
)
def test_without_its_repair_a_defect_shows(folder: Path, defect: int, config: str, error: str) -> None:
    write_page(folder, but=defect)
    overrides = SMALL if config == "whole.py" else ()
    with pytest.raises((ImportError, AttributeError, ValueError, AssertionError), match=error):
        model = built(config, *overrides)
        model(torch.rand(3, 3, 32, 32))
        model.loss(*model.preprocess((torch.rand(3, 3, 32, 32), torch.tensor([0, 1, 2])), training=True))
