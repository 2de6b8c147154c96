"""Transforms in the worker processes of a DataLoader."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import pyvips
import torch
from torch.utils.data import Dataset

import widefield.transforms as A
from tests.transforms.pictures import noise, vips


def invert(image):
    return image.invert()


ROOT = Path(__file__).parents[2]

TRANSFORMS = A.Compose(
    [
        A.RandomCrop(32, 32),
        A.Flip(),
        A.OneOf([A.Rotate(interpolation=pyvips.Interpolate.new("bicubic")), A.Affine()]),
        A.CropOrPad(32, 32),
        A.GaussNoise(),
        A.Lambda(image=invert),
        A.ToDtype("float", scale=True),
        A.ToTensor(),
    ]
)


class Slides(Dataset):
    def __init__(self, path, transforms):
        self.path, self.transforms = path, transforms

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return self.transforms(image=pyvips.Image.new_from_file(str(self.path)))["image"]


@pytest.fixture
def path(tmp_path):
    vips(noise("uint8", 3, 200, 200)).tiffsave(str(tmp_path / "a.tif"), tile=True, tile_width=64, tile_height=64)
    return tmp_path / "a.tif"


def test_transforms_pickle_as_they_are():
    copy = pickle.loads(pickle.dumps(TRANSFORMS))
    assert repr(copy) == repr(TRANSFORMS)
    image = vips(noise())
    results = []
    for transforms in (TRANSFORMS, copy):
        torch.manual_seed(0)
        results.append(transforms(image=image)["image"])
    assert torch.equal(*results)


# In processes of their own: this one has saved files, after which libvips does not survive a fork.
WORKERS = """
import sys, torch
from torch.utils.data import DataLoader
from tests.transforms.test_workers import TRANSFORMS, Slides
for workers, context, epochs in ((1, "fork", 2), (2, "fork", 2), (1, "spawn", 1)):
    loader = DataLoader(Slides(sys.argv[1], TRANSFORMS), num_workers=workers, multiprocessing_context=context)
    for _ in range(2):
        torch.manual_seed(3)
        print(*(image.double().sum().item() for _ in range(epochs) for image in loader))
"""


@pytest.mark.slow
def test_images_repeat_with_the_seed_and_differ_between_workers_and_epochs(path):
    sums = [line.split() for line in run(WORKERS, path).splitlines()]
    assert sums[0::2] == sums[1::2]
    assert [len(set(first)) for first in sums[0::2]] == [12, 12, 6]


FORK = """
import os, sys, pyvips, torch
import widefield.transforms as A
transforms = A.Compose([
    A.CropOrPad(300, 300), A.Flip(p=1), A.HueSaturationValue(p=1), A.Resize(100, 90),
    A.RandomBrightnessContrast(brightness_by_max=False, p=1), A.ToDtype("float", scale=True), A.ToTensor(),
])
def read():
    image = pyvips.Image.new_from_file(sys.argv[1])
    return transforms(image=image, mask=image)["image"]
read()
child = os.fork()
if not child:
    read()
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


def test_a_process_that_has_padded_flipped_and_read_8_bits_may_fork(path):
    assert run(FORK, path) == "0\n"


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=ROOT).stdout
