"""Vision transformers so small that a run takes a fraction of a second, and what methods of masked patches do with them."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.pretraining.tiny import TinyWrapper, assert_same, checkpoint, exported, losses, train
from widefield.components.backbones.vision_transformer import VisionTransformer
from widefield.pretraining import METHODS, EmbeddingModel, Run, wrap

ARCH = {"embed_dims": 16, "num_layers": 3, "num_heads": 2, "feedforward_channels": 32}


def timm_vit(seed: int = 0, **options: Any) -> nn.Module:
    """Patches of 4 pixels of images of 16, a class token."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}
        return timm.create_model("vit_tiny_patch16_224", **{**sizes, "dynamic_img_size": True, **options})


def own_vit(seed: int = 0, cls: Any = VisionTransformer, **options: Any) -> nn.Module:
    """The same of Widefield."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(arch=ARCH, img_size=16, patch_size=4, **{"out_type": "featmap", **options})


def make(name: str, model: nn.Module, steps: int = 100, **options: Any) -> Any:
    return METHODS.get(name)(EmbeddingModel(wrap(model)), Run(16, 100, 4, steps), **options)


def images(count: int = 4, side: int = 16) -> Tensor:
    """Pixels from 0 to 1, normalised as ImageNet's."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (torch.rand(count, 3, side, side) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def check_a_run(method: str, model: Any, folder: Path, data: Path, **options: Any) -> None:
    """Two runs of two steps are equal, a broken one goes on at the step, and the export is a state dict of the model."""
    options = {"epochs": 2, "callbacks": {"model_checkpoint": {"every_n_train_steps": 1}}, **options}
    train(folder / "whole", data, method, model=model(), **options)
    assert len(losses(folder / "whole")) == 2
    weights, before = exported(folder / "whole"), model().state_dict()
    model().load_state_dict(weights)
    assert any(not torch.equal(weights[name], before[name]) for name in weights)
    kind = METHODS.get(method)
    with pytest.MonkeyPatch.context() as patch:
        loss = kind.loss

        def stops(self: Any, views: Any, step: int) -> Any:
            if step == 3:
                raise KeyError("stop")
            return loss(self, views, step)

        patch.setattr(kind, "loss", stops)
        with pytest.raises(KeyError, match="stop"):
            train(folder / "broken", data, method, model=model(), **options)
    assert checkpoint(folder / "broken")["global_step"] == 3
    train(folder / "broken", data, method, model=model(), resume_interrupted=True, **options)
    left, right = checkpoint(folder / "broken"), checkpoint(folder / "whole")
    for key in ("state_dict", "optimizer_states", "widefield"):
        assert_same(left[key], right[key], key)


def check_refusals(method: str, tmp_path: Path, data: Path, **options: Any) -> None:
    """A convnet and an embedding layer are refused, and `out` stays as it was."""
    for model, more, message in (
        (TinyWrapper(), {}, rf"method='{method}' hides patches .* a Sequential cannot: its layers mix neighbouring"),
        (timm_vit(), {"embed_dim": 4}, rf"embed_dim: {method} trains the tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "out", data, method, model=model, **more, **options)
    assert not (tmp_path / "out").exists()
