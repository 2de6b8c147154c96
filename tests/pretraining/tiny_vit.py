"""Vision transformers so small that a run takes a fraction of a second, and what methods of masked patches do with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.pretraining.tiny import QUIET, assert_same, checkpoint, exported, losses, train
from widefield.components.backbones.vision_transformer import VisionTransformer
from widefield.pretraining import METHODS, EmbeddingModel, Run, wrap

TRANSFORMERS = [name for name in METHODS.index if METHODS.get(name).needs_transformer]
"""Methods that hide patches."""
ARCH = {"embed_dims": 16, "num_layers": 3, "num_heads": 2, "feedforward_channels": 32}


def own_vit(seed: int = 0, cls: Any = VisionTransformer, **options: Any) -> nn.Module:
    """A transformer of Widefield, of the sizes of `timm_vit`."""
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
    saving = {**QUIET["callbacks"], "model_checkpoint": {"every_n_train_steps": 1}}
    options = {**QUIET, "epochs": 2, "callbacks": saving, **options}
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
