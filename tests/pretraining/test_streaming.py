"""Views that go through the model tile by tile: the same losses and gradients."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ShuffleNetV2

from tests.pretraining.tiny import TinyWrapper, exported, small, train, write_images
from widefield import UnsupportedOpError
from widefield.pretraining import METHODS, EmbeddingModel, Run, wrap
from widefield.pretraining.embedding import StreamingArgs
from widefield.pretraining.wrapping import PartsInARow


class WithToken(TinyWrapper):
    """A wrapper whose features are a dict of more than the map, which pooling needs."""

    def forward_features(self, x: Tensor) -> dict[str, Any]:
        features = super().forward_features(x)["features"]
        return {"features": features, "scale": 1 + features.mean((2, 3), keepdim=True).tanh()}

    def forward_pool(self, x: dict[str, Any]) -> dict[str, Any]:
        return {"pooled_features": x["features"].mean((2, 3), keepdim=True) * x["scale"]}


def loss_and_gradients(
    wrapper: nn.Module, method: str, streaming: StreamingArgs | None
) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    embedding = EmbeddingModel(copy.deepcopy(wrapper), None, streaming)
    made: Any = METHODS.get(method)(embedding, Run(12, 100, 4, 50), **small(method))
    made.double().train()
    generator = torch.Generator().manual_seed(1)
    sizes = [(40, 56), (40, 56)] + ([(24, 24)] * 2 if method == "dino" else [])
    views = [torch.randn(4, 3, *size, generator=generator, dtype=torch.float64) for size in sizes]
    torch.manual_seed(2)
    loss = made.loss(views, 20)["loss"]
    loss.backward()
    return loss, {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["simclr", "dino", "densecl", "byol"])
@pytest.mark.parametrize("statistics", ["exact", "frozen"])
def test_losses_and_gradients_are_those_of_whole_views(method: str, statistics: Any) -> None:
    wrapper = WithToken()
    if statistics == "frozen":
        wrapper.model[1].eval()
        wrapper.model[1].train = lambda mode=True: wrapper.model[1]  # stays in evaluation mode on the plain side
    plain, wanted = loss_and_gradients(wrapper, method, None)
    streamed, found = loss_and_gradients(wrapper, method, StreamingArgs(16, batch_statistics=statistics))
    torch.testing.assert_close(streamed, plain, rtol=1e-10, atol=0)
    assert found.keys() == wanted.keys()
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        # biases ahead of a norm layer have gradients of rounding errors alone
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=float(largest) * 1e-13, msg=name)


def test_a_streamed_run_is_the_run_on_whole_views(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    options: dict[str, Any] = {"precision": "64-true", "epochs": 2, "transform_args": {"image_size": 40}}
    train(tmp_path / "whole", images, **options)
    train(tmp_path / "tiles", images, streaming={"tile_size": 16}, **options)
    whole, tiles = exported(tmp_path / "whole"), exported(tmp_path / "tiles")
    assert whole.keys() == tiles.keys(), "names of weights do not depend on streaming"
    for name, value in whole.items():
        torch.testing.assert_close(tiles[name], value, rtol=1e-8, atol=1e-10)
    train(tmp_path / "budget", images, streaming={"memory_budget": "200MiB"}, **{**options, "epochs": 1})


def test_what_cannot_be_streamed_is_told_before_out_is_made(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 4)

    class Sorts(TinyWrapper):
        def forward_features(self, x: Tensor) -> dict[str, Any]:
            return {"features": super().forward_features(x)["features"].sort(-1).values}

    with pytest.raises(UnsupportedOpError, match=r"aten\.sort runs along"):
        train(tmp_path / "out", images, model=Sorts(), streaming={"tile_size": 16})
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_models_of_torchvision_stream() -> None:
    model = wrap(ShuffleNetV2([1, 1, 1], [8, 16, 16, 16, 32]))
    assert isinstance(model, PartsInARow)
    embedding = EmbeddingModel(model.eval(), None, StreamingArgs(64, batch_statistics="frozen"))
    views = torch.rand(1, 3, 96, 128)
    torch.testing.assert_close(embedding(views), EmbeddingModel(model)(views), rtol=1e-4, atol=1e-5)
