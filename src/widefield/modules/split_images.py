"""Training on several processes of which some share each image: Lightning's DDP over groups of processes."""

import random
from collections.abc import Iterable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import distributed, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from widefield.streaming import StreamingCNN


class SplitImages(DDPStrategy):
    """DDP in which `processes` neighbouring processes share each image, and as many such groups train on images of their own.

        Trainer(strategy=SplitImages(), devices=4)   # one image at a time, over 4 processes
        Trainer(strategy=SplitImages(2), devices=4)  # two images at a time, over 2 processes each

    Each process reads and computes a band of rows in every `StreamingCNN` of the model, and all of them have the whole results. The
    rest of the model, such as the head, is computed in each. The processes of a group get the same items from their samplers, and
    draw the same random numbers from torch's, Python's and NumPy's default generators, in workers too. Losses and weights are those
    of as many processes as there are groups, each of which computes whole images.

    Metrics (of torchmetrics, anywhere in the model) count each image once, and so do means that are logged with `sync_dist=True`;
    sums count it once for each process. Code that runs in one process only, such as a callback behind `rank_zero_only`, must not
    call the model while it trains.

    Args:
        processes: That share an image; None: all. Their number must divide that of all processes.
        find_unused_parameters: Let the loss leave out parameters of the model, see `DistributedDataParallel`.
        timeout: Seconds for which a process waits for others that may read a larger part of an image. One that has died is noticed
            at once.

    Attributes:
        replicas: The process group over which metrics count: one process of each group that shares an image. None before the
            processes are connected.

    Raises:
        ValueError: When the trainer is made: there is one process only, or a number of processes that cannot be divided so.
    """

    def __init__(
        self, processes: int | None = None, find_unused_parameters: bool = False, timeout: float = 1800.0
    ) -> None:
        if processes is not None and processes < 1:
            raise ValueError(f"processes={processes} must be at least 1, or None for all")
        super().__init__(timeout=timedelta(seconds=timeout), find_unused_parameters=find_unused_parameters)
        self._processes = processes
        self._group: Any = None
        self.replicas: Any = None

    @property
    def processes(self) -> int:
        """Number of processes that share an image."""
        return self._processes or self.world_size

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Return the number of groups, and that to which this process belongs."""
        return {"num_replicas": self.world_size // self.processes, "rank": self.global_rank // self.processes}

    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        if self.world_size == 1:
            raise ValueError(
                "an image can be split over several processes only, and there is one: start them with "
                "`torchrun --nproc-per-node 4 -m widefield fit ...`, or give the trainer devices=4"
            )
        if self.world_size % self.processes:
            divisors = [str(n) for n in range(1, self.world_size + 1) if self.world_size % n == 0]
            raise ValueError(
                f"{self.world_size} processes cannot be divided into groups of {self.processes} that share an image; let "
                f"{', '.join(divisors)} share one, or start another number of processes"
            )

    def setup_distributed(self) -> None:
        # Lightning begins the random numbers anew, as in any DDP; those of one group go on as in one process.
        with isolate_rng() if self.processes == self.world_size else nullcontext():
            super().setup_distributed()
        ranks = torch.arange(self.world_size).view(-1, self.processes)
        connect = partial(distributed.new_subgroups_by_enumeration, timeout=self._timeout)
        self._group, _ = connect(ranks.tolist())
        self.replicas, _ = connect(ranks.T.tolist())

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        for part in self._parts():
            if isinstance(part, StreamingCNN):
                part.share(self._group, gather=True)
            elif isinstance(part, Metric):
                part.process_group = self.replicas

    def process_dataloader(self, dataloader: object) -> object:
        """Seed the workers of all processes of a group alike."""
        dataloader = super().process_dataloader(dataloader)
        if isinstance(dataloader, DataLoader) and dataloader.worker_init_fn is None:
            dataloader.worker_init_fn = partial(pl_worker_init_function, rank=self.distributed_sampler_kwargs["rank"])
        return dataloader

    def on_train_start(self) -> None:
        """Let the processes of a group draw the same random numbers from here on."""
        cuda = self.root_device if self.root_device.type == "cuda" else None
        states: list[Any] = [
            torch.get_rng_state(),
            random.getstate(),
            np.random.get_state(),
            None if cuda is None else torch.cuda.get_rng_state(cuda),
        ]
        distributed.broadcast_object_list(states, group_src=0, group=self._group)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state(states[3], cuda)

    def teardown(self) -> None:
        """Let each process call the model for itself again."""
        for part in self._parts():
            if isinstance(part, StreamingCNN):
                part.share(None)
        super().teardown()

    def _parts(self) -> Iterable[nn.Module]:
        """The modules of the model, and what streams them, which is no submodule of a backbone of `widefield.components`."""
        parts = [] if self.lightning_module is None else list(self.lightning_module.modules())
        streams = [value for part in parts for value in vars(part).values() if isinstance(value, StreamingCNN)]
        return {id(part): part for part in (*parts, *streams)}.values()
