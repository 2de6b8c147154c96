"""What a Lightning trainer must not do with a streamed trunk."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy


def check_trainer(trainer: Trainer, frozen_norms: bool) -> None:
    """Raises ValueError for strategies that split parameters, and for weight averaging that resets frozen norm layers."""
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"{type(trainer.strategy).__name__} splits parameters among devices, but a streamed trunk needs whole ones at "
            'every tile; use strategy="ddp". What fills the memory here are maps, and memory_budget bounds those'
        )
    if frozen_norms and any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
        raise ValueError(
            "StochasticWeightAveraging resets the running statistics of norm layers to gather them anew, but those of a streamed "
            'trunk are frozen; use EMAWeightAveraging or WeightAveraging, or batch_statistics="exact"'
        )
