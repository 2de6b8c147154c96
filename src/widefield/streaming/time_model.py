"""The time of a pass relative to plain PyTorch's, from what its scans compute, copy and call.

Times are counted in multiplications, those of convolutions and matrix products. What else takes time is counted by kinds, each with
a rate: how many multiplications take as long. Rates were fitted to measurements; a processor with faster arithmetic, or slower
memory, has others.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from widefield.streaming.memory import Footprint


@dataclass(frozen=True)
class Amounts:
    """Counts of the operations of a pass, by kind; or, as rates, the number of multiplications that take as long as one of a kind.

    `elements` are those of maps that are computed by tiles, `elements_whole` by whole maps, which fit into no cache, and
    `elements_kept` by whole maps that all lie in memory until a backward pass has used them; `held` those put together with what
    was carried; `weights` those of all steps; `filed` those that are written to files which are used again or, three for one,
    read, and four times those that are written to new ones; `calls` of operations, one by one, on tiles, and `calls_whole` on whole
    maps.
    """

    multiplications: float = 0.0
    elements: float = 0.0
    elements_whole: float = 0.0
    elements_kept: float = 0.0
    held: float = 0.0
    weights: float = 0.0
    filed: float = 0.0
    calls: float = 0.0
    calls_whole: float = 0.0


# Fitted on 11 passes of 5 networks with two threads of an AVX-512 CPU, see docs/benchmarks.md. Elsewhere nothing was fitted: plans
# count what is computed twice.
RATES = {"cpu": Amounts(1, 35, 40, 61, 15, 23, 55, 3.6e6, 1e6), "cuda": Amounts(1, 32, 32, 32)}
_OTHER_PASSES = 2  # a backward pass takes as long as two forward
_NEW_FILES = 4  # times as long as files that are used again, as they are in passes without gradients


def amounts(
    footprints: Sequence[Footprint], recorded: Sequence[float], training: bool, files: tuple[bool, bool]
) -> tuple[Amounts, Amounts]:
    """Return what a pass does, streamed and by plain PyTorch.

    `recorded` is the share of each stage that is not computed again in the backward pass. `files`: maps between stages, and
    carries, are in files.
    """
    whole = all(footprint.steps == 1 for footprint in footprints)
    streamed, once = defaultdict[str, float](float), dict[str, tuple[float, ...]]()
    for footprint, share in zip(footprints, recorded, strict=True):
        model, positions = footprint.needs, footprint.positions
        passes = 1 + training * (_OTHER_PASSES + 1 - share)
        multiplications, elements = positions * model.multiplications, positions * model.elements
        for v, value in enumerate(model.stage.values):
            if value.reduction is not None:
                elements[v] = elements[list(value.sources)].sum()
            once.setdefault(value.name, (multiplications[v], elements[v], value.weight_bytes / model.itemsize))
        filed = files[0] * footprint.map_elements(training, 1 - share)
        filed += files[1] * training * sum(footprint.carries.values()) / model.itemsize * 4 / 3
        did = {
            "multiplications": passes * multiplications.sum(),
            "held": passes * footprint.held,
            "weights": passes * sum(model.stage.weight_sizes) / model.itemsize * footprint.steps,
            "filed": filed * (_NEW_FILES if training else 1),
        }
        if not whole:
            did |= {"elements": passes * elements.sum(), "calls": passes * footprint.steps * len(model.stage.values)}
        for kind, amount in did.items():
            streamed[kind] += float(amount)
    passes, sums = 1 + training * _OTHER_PASSES, np.array(list(once.values())).reshape(-1, 3).sum(0).tolist()
    at_once = {"elements_kept" if training else "elements_whole": passes * sums[1], "calls_whole": passes * len(once)}
    if whole:
        streamed.update(at_once)
    return Amounts(**streamed), Amounts(passes * sums[0], weights=passes * sums[2], **at_once)


def relative_time(streamed: Amounts, plain: Amounts, device: str) -> float:
    """Return how many times as long the first takes."""
    times = [np.dot(astuple(RATES.get(device, RATES["cuda"])), astuple(of)) for of in (streamed, plain)]
    return float(times[0] / max(1.0, times[1]))
