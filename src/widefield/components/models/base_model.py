"""What models of components share: they are components, and Lightning trains them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from widefield.components.annotations import InitConfig
from widefield.components.base_module import BaseModule
from widefield.components.data_sample import DataSample


class BaseModel(BaseModule, LightningModule):
    """A model that gives its losses by name: a subclass writes `loss`, and Lightning does the rest.

    A batch is `(images, targets)`: images a tensor (N, C, H, W) or a list of lazily read images, which are read whole; targets
    class indices (N,), or a `DataSample` for each image.

    Args:
        lr: Learning rate of AdamW; a configuration with a section `optimizer` decides otherwise.
        weight_decay: Its weight decay.
        init_cfg: See `BaseModule`.
    """

    component_kind = "model"
    device: torch.device
    log_dict: Any  # this and the next are Lightning's; mypy does not see them
    save_hyperparameters: Any

    def __init__(self, lr: float = 1e-3, weight_decay: float = 0.0, init_cfg: InitConfig = None) -> None:
        super().__init__(init_cfg)
        self.lr = lr
        self.weight_decay = weight_decay

    def loss(self, inputs: Tensor, data_samples: Sequence[DataSample]) -> dict[str, Any]:
        """Losses and other numbers by name; those whose name contains "loss" are summed and minimised."""
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "test")

    def configure_optimizers(self) -> Any:
        """AdamW over all parameters that require a gradient."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def _step(self, batch: Any, phase: str) -> Tensor:
        inputs, samples = self._unpack(batch)
        numbers = self.loss(inputs, samples)
        total = total_loss(numbers)
        shown = {f"{phase}_{name}": float(value) for name, value in numbers.items() if name != "loss"}
        self.log_dict({f"{phase}_loss": total.detach(), **shown}, on_epoch=True, on_step=False, batch_size=len(samples))
        return total

    def _unpack(self, batch: Any) -> tuple[Tensor, list[DataSample]]:
        images, targets = batch
        samples = [
            target if isinstance(target, DataSample) else DataSample().set_gt_label(target.cpu()) for target in targets
        ]
        return images if isinstance(images, Tensor) else read_images(images).to(self.device), samples


def total_loss(numbers: Mapping[str, Any]) -> Tensor:
    """The sum of the means of all numbers whose name contains "loss"; a list of tensors counts as the sum of their means."""
    losses = [value for name, value in numbers.items() if "loss" in name]
    if not losses:
        raise ValueError(
            f"loss() returned {', '.join(numbers) or 'nothing'}; a loss is a number whose name contains 'loss'"
        )
    parts = [part for loss in losses for part in (loss if isinstance(loss, (list, tuple)) else [loss])]
    return torch.stack([part.mean() for part in parts]).sum()


def read_images(images: Sequence[Any]) -> Tensor:
    """Lazily read images of one size as a tensor (N, C, H, W) of float32; integers are divided by their largest value.

    Raises:
        ValueError: Their sizes differ.
    """
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        sizes = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes))
        raise ValueError(
            f"the images of a batch have the shapes {sizes}; give images of one size, or data.batch_size=1"
        )
    tensors = [torch.as_tensor(image.read(0, 0, *image.shape[1:])) for image in images]
    batch = torch.stack(tensors)
    return batch.float() if batch.is_floating_point() else batch.float() / torch.iinfo(batch.dtype).max
