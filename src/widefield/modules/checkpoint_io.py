"""Checkpoints that are either whole or not there."""

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO

from widefield.writing import write_torch_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place, then rename it: a process killed while writing leaves the old one intact.

    Checkpoints hold tensors and plain data only and are read with `weights_only=True`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError(f"AtomicCheckpointIO takes no storage_options, got {storage_options!r}; omit them")
        write_torch_file(checkpoint, Path(path))
