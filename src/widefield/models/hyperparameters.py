"""What a checkpoint says of how its model was made."""

from typing import Any

from widefield.modules import BaseModule


def save_plainly(module: BaseModule, **arguments: Any) -> None:
    """Keep `arguments` and how images are normalised in the checkpoint, as plain data: `load_from_checkpoint` needs no more.

    Not kept: the loss and metrics, which are no plain data; `weights`, which the checkpoint replaces; and `tile_size` and
    `memory_budget`, which belong to the machine.
    """
    used = module.stream_network.normalisation
    normalisation = {
        name: None if value is None else [float(number) for number in value]
        for name, value in (("mean", used.mean), ("std", used.std), ("value_range", used.value_range))
    }
    module.save_hyperparameters(
        {**arguments, "weights": None, "lr": module.lr, "weight_decay": module.weight_decay, **normalisation},
        logger=False,
    )
