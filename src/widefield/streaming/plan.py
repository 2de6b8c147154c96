"""The plan of a streamed pass over an image of a given size: tile, steps and memory, known before any pixel is computed."""

import dataclasses
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from widefield.streaming.budget import format_bytes
from widefield.streaming.errors import UnsupportedOpError
from widefield.streaming.layers import Layer, layer_table
from widefield.streaming.store import Place


@dataclass(frozen=True)
class Plan:
    """A streamed pass over an image of `image_shape` (N, C, H, W).

    `tile_size` is (height, width) in pixels, `steps` the number of tiles scanned (those that drain the network included).
    `computed_fraction` is the share of all maps, by bytes, that is computed: below 1 for a region, with a mask, and in one of
    several processes, where 1 / computed_fraction is the speed-up to be expected.
    `predicted_bytes` at the peak, above the weights, their gradients and the image, by kind:

    - `weights`: copies and combinations of weights, and the sums of their gradients while a pass lasts;
    - `carries`: what is saved between tiles, and the gradients of a row of it;
    - `step`: activations and gradients of the tile that needs most;
    - `recorded`: activations of tiles that are not recomputed;
    - `outputs`: maps that leave the streamed part, and gradients of those that later stages read; `maps`: those between stages,
      or the part of them that a step reads and writes in files; `plain`: what operations outside of scans make;
    - `kernels`: what the library of convolutions keeps for itself: scratch memory, and kernels that it has compiled;
    - `allocator`: memory that the allocator holds without using it.

    `predicted_overhead` is the time relative to plain PyTorch's on whole maps: on a CPU by rates that were measured (`time_model`),
    elsewhere by what is computed alone, 4/3 of a plain step where all tiles are computed twice. `layers` is the geometry of every
    layer. `streamed_fraction` is the share of the plain model's activation bytes that is streamed; the rest is computed
    whole, because of the operations `refused`. `stages` is the number of scans; `map_bytes` is what the maps between them need,
    gradients included, and `map_place` where they live, `carry_place` where the carries do: only on the device they count.
    `recorded` says of each scan how many of its steps are recorded, and how many it has; the others are computed twice.

    Examples:
        >>> plan = wf.stream(nn.Conv2d(3, 8, 3), tile_size=1000).plan((3, 4000, 6000))
        >>> plan.tile_size, plan.streamed_fraction
        ((1000, 1000), 1.0)
    """

    image_shape: tuple[int, int, int, int]
    tile_size: tuple[int, int]
    steps: int
    predicted_bytes: MappingProxyType[str, int]
    predicted_overhead: float
    layers: tuple[Layer, ...]
    streamed_fraction: float
    stages: int = 1
    map_bytes: int = 0
    map_place: Place = "device"
    carry_place: Place = "device"
    refused: tuple[UnsupportedOpError, ...] = ()
    computed_fraction: float = 1.0
    recorded: tuple[tuple[int, int], ...] = ()

    @property
    def total_bytes(self) -> int:
        """Sum of `predicted_bytes`."""
        return sum(self.predicted_bytes.values())

    @property
    def summary(self) -> str:
        """The plan without its layers."""
        scans = enumerate(self.recorded) if any(some for some, _ in self.recorded) else ()
        rows = [
            ("image", " x ".join(map(str, self.image_shape))),
            ("tile", f"{self.tile_size[0]} x {self.tile_size[1]}"),
            ("steps", str(self.steps)),
            *([("computed", f"{self.computed_fraction:.1%} of all maps")] if self.computed_fraction < 1 else []),
            ("time", f"about {self.predicted_overhead:.2f} x a plain pass"),
            *((f"memory: {kind}", format_bytes(size)) for kind, size in self.predicted_bytes.items() if size),
            ("memory: total", format_bytes(self.total_bytes)),
            ("stages", str(self.stages)),
            *(
                (f"  stage {s}", f"{some} of {steps} steps recorded, {steps - some} computed twice")
                for s, (some, steps) in scans
            ),
            *([("maps", f"{format_bytes(self.map_bytes)} between stages: {self.map_place}")] if self.map_bytes else []),
            *([("carries", f"in: {self.carry_place}")] if self.carry_place != "device" else []),
            ("streamed", f"{self.streamed_fraction:.1%} of the activation bytes"),
        ]
        return "\n".join(f"{name:<18}{text}" for name, text in rows)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return data | {
            "predicted_bytes": dict(self.predicted_bytes),
            "total_bytes": self.total_bytes,
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "refused": [vars(error) for error in self.refused],
        }

    def __str__(self) -> str:
        return f"{self.summary}\n\n{layer_table(self.layers)}"

    def __reduce__(self) -> Any:
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return _restore, tuple(dict(value) if isinstance(value, MappingProxyType) else value for value in fields)


def _restore(*fields: Any) -> Plan:
    values: list[Any] = [MappingProxyType(value) if isinstance(value, dict) else value for value in fields]
    return Plan(*values)
