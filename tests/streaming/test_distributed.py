"""Two processes: batch statistics of all of them, as `torch.nn.SyncBatchNorm` has them."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn

from tests.streaming.exactness import randomise, relative_error
from widefield.streaming import StreamingCNN

SIZES = [(2, 3, 23, 19), (1, 3, 17, 30)]  # the processes need not have equally many pixels


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)]
    return randomise(nn.Sequential(*layers)).double().train()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator, dtype=torch.float64) + k for k, size in enumerate(SIZES)]


class Together(nn.Module):
    """The reference: both processes' images through the network, normalised by the statistics of all their pixels."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: list[Tensor]) -> list[Tensor]:
        for layer in self.net:
            if isinstance(layer, nn.BatchNorm2d):
                pixels = torch.cat([x.movedim(1, -1).flatten(0, 2) for x in batch])[:, :, None, None]
                normed = layer(pixels).squeeze(-1, -2).split([x.numel() // x.shape[1] for x in batch])
                batch = [
                    y.view(x.shape[0], *x.shape[2:], -1).movedim(-1, 1) for x, y in zip(batch, normed, strict=True)
                ]
            else:
                batch = [layer(x) for x in batch]
        return batch


def run(rank: int, port_file: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    reference = copy.deepcopy(network())
    streamed = StreamingCNN(net, (7, 11), batch_statistics="exact")
    image = images()[rank].requires_grad_()
    out = streamed(image)
    out.square().sum().backward()

    whole = [x.requires_grad_() for x in images()]
    expected = Together(reference)(whole)
    torch.stack([x.square().sum() for x in expected]).sum().backward()
    assert relative_error(out.detach(), expected[rank].detach()) < 1e-10
    assert relative_error(image.grad, whole[rank].grad) < 1e-10
    scale = max(p.grad.abs().max().item() for p in reference.parameters())
    for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
        distributed.all_reduce(p.grad)  # DistributedDataParallel takes SyncBatchNorm layers on CUDA devices only
        assert (p.grad - q.grad).abs().max().item() < 1e-10 * scale, name
    for (name, b), c in zip(net.named_buffers(), reference.buffers(), strict=True):
        assert relative_error(b, c) < 1e-10, name
    distributed.destroy_process_group()


def test_batch_statistics_of_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # the processes import this module
    spawn(run, (str(tmp_path / "rendezvous"),), nprocs=2)
