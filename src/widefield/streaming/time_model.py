"""The time of a pass relative to plain PyTorch's, from what its scans compute, copy and call.

Times are counted in multiplications, those of convolutions and matrix products. What else takes time is counted by kinds, each with
a rate: how many multiplications take as long. Rates were fitted to measurements; a processor with faster arithmetic, or slower
memory, has others.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from widefield.streaming.memory import Footprint


@dataclass(frozen=True)
class Amounts:
    """Counts of the operations of a pass, by kind; or, as rates, the number of multiplications that take as long as one of a kind.

    `elements` are those of maps that are computed by tiles, `elements_whole` by whole maps, which fit into no cache; `held` those
    that are put together with what was carried; `weights` those of all steps; `filed` those that are written to files or, three
    for one, read; `calls` of operations, one by one.
    """

    multiplications: float = 0.0
    elements: float = 0.0
    elements_whole: float = 0.0
    held: float = 0.0
    weights: float = 0.0
    filed: float = 0.0
    calls: float = 0.0


# Fitted on 24 passes of 16 networks with two threads of an AVX-512 CPU, see docs/benchmarks.md. Elsewhere nothing was fitted:
# plans count what is computed twice.
RATES = {"cpu": Amounts(1, 24, 70, 60, 33, 200, 4e5), "cuda": Amounts(1, 32, 32)}
_OTHER_PASSES = 2  # a backward pass takes as long as two forward


def amounts(
    footprints: Sequence[Footprint], recorded: Sequence[float], training: bool, files: tuple[bool, bool]
) -> tuple[Amounts, Amounts]:
    """Return what a pass does, streamed and by plain PyTorch.

    `recorded` is the share of each stage that is not computed again in the backward pass. `files`: maps between stages, and
    carries, are in files.
    """
    whole = all(footprint.steps == 1 for footprint in footprints)
    streamed, once = np.zeros(len(astuple(Amounts()))), dict[str, tuple[float, float]]()
    for footprint, share in zip(footprints, recorded, strict=True):
        model, positions = footprint.needs, footprint.positions
        passes = 1 + training * (_OTHER_PASSES + 1 - share)
        multiplications, elements = positions * model.multiplications, positions * model.elements
        for v, value in enumerate(model.stage.values):
            if value.reduction is not None:
                elements[v] = elements[list(value.sources)].sum()
            once.setdefault(value.name, (multiplications[v], elements[v]))
        steps = footprint.steps
        weights = sum(model.stage.weight_sizes) / model.itemsize
        by_tiles, at_once = (0.0, elements.sum()) if whole else (elements.sum(), 0.0)
        computed = multiplications.sum(), by_tiles, at_once, footprint.held, weights * steps
        filed = files[0] * footprint.map_elements(training, 1 - share)
        filed += files[1] * training * sum(footprint.carries.values()) / model.itemsize * 4 / 3
        streamed += np.array([*(passes * x for x in computed), filed, passes * steps * len(model.stage.values)])
    passes, sums = 1 + training * _OTHER_PASSES, np.array(list(once.values())).reshape(-1, 2).sum(0)
    return Amounts(*streamed.tolist()), Amounts(passes * sums[0], 0, passes * sums[1])


def relative_time(streamed: Amounts, plain: Amounts, device: str) -> float:
    """Return how many times as long the first takes."""
    times = [np.dot(astuple(RATES.get(device, RATES["cuda"])), astuple(of)) for of in (streamed, plain)]
    return float(times[0] / max(1.0, times[1]))
