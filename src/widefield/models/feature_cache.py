"""Maps of a frozen trunk, kept in a folder so that each is computed once."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import widefield
from widefield.components.models.features import background_of
from widefield.streaming import StreamingCNN
from widefield.writing import replacing


class FeatureCache:
    """Maps (1, D, h, w) of images, each as a Zarr array in a folder: `NAME.KEY.zarr`.

    The key is a hash of all that a map depends on: the file (its path, size and time of change), how it is opened (level, spacing,
    channels), its background, the trunk's weights and normalisation, the precision of autocast, and Widefield's version. So a map
    of other weights or another spacing is computed anew, beside the former one.

    Args:
        folder: Made with the first map.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._weights: tuple[tuple[int, ...], str] | None = None

    def get(self, network: StreamingCNN, image: Any, compute: Callable[[Any], Tensor]) -> Tensor:
        """Return the map of a lazily read image, on the device of the network: as it was kept, or computed and kept now."""
        import zarr

        path = self.folder / f"{Path(image.path).name}.{self._key(network, image)}.zarr"
        device = next(network.parameters()).device
        if path.is_dir():
            kept: Any = zarr.open_array(path, mode="r")
            return torch.from_numpy(np.asarray(kept[:])).to(device)
        with torch.no_grad():
            fmap = compute(image)
        values = fmap.float() if fmap.dtype == torch.bfloat16 else fmap  # NumPy has no bfloat16
        try:
            with replacing(path) as partial:
                array: Any = values.cpu().numpy()
                zarr.save_array(partial, array)
        except OSError:
            if not path.is_dir():  # else another process was faster
                raise
            shutil.rmtree(path.with_name(partial.name), ignore_errors=True)
        return values

    def _key(self, network: StreamingCNN, image: Any) -> str:
        file, background = Path(image.path), background_of(image)
        known = file.stat()
        described = {
            "file": [str(file.absolute()), known.st_size, known.st_mtime_ns],
            "opened": {name: repr(value) for name, value in sorted(image._arguments.items())},
            "shape": list(image.shape),
            "background": None if background is None else [_digest(background.mask.cells), list(background.fill)],
            "network": repr(network.module),
            "weights": self._weights_of(network),
            "normalisation": repr(network.normalisation),
            "autocast": str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else None,
            "version": widefield.__version__,
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:24]

    def _weights_of(self, network: StreamingCNN) -> str:
        """Return a hash of the weights, computed again when one of them was changed."""
        module = network.module
        state = dict([*module.named_parameters(), *module.named_buffers()])  # those that are not saved as well
        versions = tuple(value for one in state.values() for value in (one.data_ptr(), one._version))
        if self._weights is None or self._weights[0] != versions:
            hashed = hashlib.sha256()
            for name, value in state.items():
                hashed.update(name.encode())
                hashed.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
            self._weights = versions, hashed.hexdigest()
        return self._weights[1]


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()
