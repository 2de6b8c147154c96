"""The streamed modules by the names and with the positional arguments of lightstream: thin subclasses of `BaseModule`."""

from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from widefield.modules.streaming_module import BaseModule, Loss
from widefield.streaming import StreamingCNN


class StreamingModule(BaseModule):
    """A trunk that streams, a head on its map, and a loss: `BaseModule`, by the name to subclass.

    The trunk and the head are parts of a network that was split, for example by `widefield.split` or `split_resnet`. Arguments,
    batches and attributes are those of `BaseModule`; with two differences in what may be given by position, as lightstream 1.x has
    it: `(trunk, tile_size)` is a trunk alone, and `(trunk, head, loss_fn)` has a trunk that streams already.

    Examples:
        >>> trunk = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())
        >>> head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> module = wf.StreamingModule(trunk, head, tile_size=64, loss_fn=nn.CrossEntropyLoss())
        >>> module(torch.rand(1, 3, 100, 70)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        stream_network: nn.Module,
        head: nn.Module | int | tuple[int, int | None] | None = None,
        tile_size: int | tuple[int, int | None] | Loss | None = None,
        loss_fn: Loss | None = None,
        train_streaming_layers: bool = True,
        metrics: Metric | MetricCollection | None = None,
        **options: Any,
    ) -> None:
        if isinstance(head, (int, tuple)):
            head, tile_size, loss_fn = None, head, None  # behind them stands where the tile cache was
        elif tile_size is not None and not isinstance(tile_size, (int, tuple, list, str)):
            tile_size, loss_fn = None, tile_size
        super().__init__(stream_network, head, tile_size, loss_fn, train_streaming_layers, metrics, **options)


class LightningStreamingModule(StreamingModule):
    """A trunk that streams as lightstream 1.x has it: its map is a leaf of autograd, and its backward pass is called by hand.

        fmap = self.stream_network(image)
        fmap.requires_grad = self.training
        self.manual_backward(self.loss_fn(self.head(fmap), target))
        self.stream_network.backward(image, fmap.grad)

    The trunk is streamed once more in the backward pass, and does not train without. In new code a `StreamingModule` does both.
    Arguments are those of `StreamingModule`.
    """

    def __init__(self, stream_network: nn.Module, *arguments: Any, **options: Any) -> None:
        super().__init__(stream_network, *arguments, **options)
        self.stream_network.register_forward_hook(_as_leaf)

    def freeze_normalization_layers(self) -> None:
        """Another name of `freeze_streaming_normalization_layers`."""
        self.freeze_streaming_normalization_layers()

    def unfreeze_streaming_network(self) -> None:
        """Let the trunk train."""
        self.train_streaming_layers = True


def _as_leaf(network: StreamingCNN, images: Any, fmap: Any) -> Any:
    return fmap.detach() if isinstance(fmap, Tensor) and network.enabled else fmap


class ImageNetClassifier(StreamingModule):
    """A `StreamingModule` whose outputs are logits (N, classes) and whose targets are class indices (N,).

    Metrics and `predict_step` get probabilities, the softmax of the logits. Arguments are those of `StreamingModule`, whose
    `stream_network` is called `stream_net` here. With a trunk that streams already, as in lightstream 1.x, they are its by
    default: `weight_decay=1e-5, accumulate_grad_batches=2`.
    """

    def __init__(
        self,
        stream_net: nn.Module,
        head: nn.Module | None,
        tile_size: int | tuple[int, int | None] | Loss | None = None,
        loss_fn: Loss | None = None,
        train_streaming_layers: bool = True,
        metrics: Metric | MetricCollection | None = None,
        **options: Any,
    ) -> None:
        if isinstance(stream_net, BaseModule):
            options = {"weight_decay": 1e-5, "accumulate_grad_batches": 2, **options}
        super().__init__(stream_net, head, tile_size, loss_fn, train_streaming_layers, metrics, **options)

    def predictions(self, output: Tensor) -> Tensor:
        """Probabilities (N, classes); of a single logit (N, 1) its sigmoid."""
        return output.sigmoid() if output.shape[-1] == 1 else output.softmax(dim=-1)
