"""Files that `torch.save` wrote, read so that they can execute nothing."""

from pathlib import Path
from typing import Any

import torch


def read_torch_file(path: Path) -> Any:
    """The content of a file of tensors and plain data, on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, or it is truncated, or it holds other objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the unpickler raises on a foreign file is anything: KeyError, EOFError, ...
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as tensors and plain data saved by torch ({type(error).__name__}: {reason}); "
            "it is another kind of file, or truncated"
        ) from error
