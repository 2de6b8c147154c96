"""A forward and backward pass over a tiled TIFF of 700 MB needs a fraction of that in memory."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

SIDE = 15_360  # 3 x 15360 x 15360 bytes: 708 MB

SCRIPT = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
from torch import nn
import widefield as wf

def status(field):
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith(field))) * 1024

torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
streamed = wf.StreamingCNN(net, (256, None))
streamed(torch.rand(1, 3, 512, 512)).mean().backward()
image = wf.open_image(sys.argv[1])
streamed.plan(image.shape)
net.zero_grad()
gc.collect()
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
out = streamed(image)
out.mean().backward()
assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
print(json.dumps({"raised": status("VmHWM") - before, "shape": list(out.shape)}))
"""


def _tiles(rows: int = 256) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    tile = generator.integers(0, 255, (rows, rows, 3), dtype=np.uint8)
    for _ in range((SIDE // rows) ** 2):
        yield tile


@pytest.mark.slow
def test_streaming_a_large_tiff_needs_a_fraction_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "large.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(_tiles(), shape=(SIDE, SIDE, 3), dtype=np.uint8, tile=(256, 256), photometric="rgb")
    assert path.stat().st_size > 700e6
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["shape"] == [1, 2, SIDE // 16, SIDE // 16]
    assert result["raised"] < 0.4 * path.stat().st_size, f"{result['raised'] / 2**20:.0f} MiB"
