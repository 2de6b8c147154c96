"""Images go to threads, to worker processes, and stay small in memory."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pyvips
from pylibCZIrw import czi as pyczi

from tests.images.conftest import picture
from widefield.images import open_image

WRITERS = {
    "a.tif": {"tile": True, "tile_width": 64, "tile_height": 64, "pyramid": True},
    "a.png": {},
    "strips.tif": {"compression": "lzw"},
}


WRITING = """
import sys, numpy, pyvips
pixels, folder, options = sys.argv[1:]
for name, one in eval(options).items():
    pyvips.Image.new_from_array(numpy.load(pixels)).write_to_file(f"{folder}/{name}", **one)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A picture in every format."""
    folder, rgb = tmp_path_factory.mktemp("files"), picture()
    np.save(folder / "a.npy", rgb)
    with pyczi.create_czi(str(folder / "a.czi"), compression_options="zstd1:") as file:
        for y in range(0, 201, 64):
            file.write(np.ascontiguousarray(rgb[y : y + 64, :, ::-1]), (-20, y - 30))
    # in a process of its own: saving starts the thread pool of libvips, which does not survive the fork below
    subprocess.run([sys.executable, "-c", WRITING, folder / "a.npy", folder, repr(WRITERS)], check=True)
    return folder


@pytest.fixture(params=[*WRITERS, "a.npy", "a.czi"])
def path(request, folder):
    return folder / request.param


def test_an_image_pickles_before_and_after_it_was_read(path, chw):
    image = open_image(path)
    for _ in range(2):
        copy = pickle.loads(pickle.dumps(image))
        assert (copy.path, copy.level, copy.levels, copy.shape) == (path, 0, image.levels, image.shape)
        np.testing.assert_array_equal(copy.read(10, 20, 150, 200), chw[:, 10:160, 20:220])
        image.read(0, 0, 201, 333)


def test_a_pickled_level_stays_that_level(tmp_path, rgb):
    pyvips.Image.new_from_array(rgb).tiffsave(str(tmp_path / "a.tif"), **WRITERS["a.tif"])
    assert pickle.loads(pickle.dumps(open_image(tmp_path / "a.tif", 2))).shape == (3, 50, 83)


def test_threads_read_the_same_image_at_the_same_time(path, chw):
    image = open_image(path)
    rng = np.random.default_rng(0)
    regions = [(*rng.integers(0, (150, 250)).tolist(), *rng.integers(1, (51, 83)).tolist()) for _ in range(200)]
    with ThreadPoolExecutor(4) as pool:
        for (y, x, h, w), pixels in zip(regions, pool.map(lambda region: image.read(*region), regions), strict=True):
            np.testing.assert_array_equal(pixels, chw[:, y : y + h, x : x + w])


FORK = """
import os, signal, sys
from widefield.images import open_image, thumbnail
paths = sys.argv[1:]
used, unused = [open_image(path) for path in paths], [open_image(path) for path in paths]
before = [image.read(0, 0, 150, 200).sum() for image in used]
for image in used:
    thumbnail(image, 50)
child = os.fork()
if child == 0:
    signal.alarm(20)
    for k, (path, expected) in enumerate(zip(paths, before)):
        images = used[k], unused[k], open_image(path)
        if any(image.read(0, 0, 150, 200).sum() != expected for image in images):
            os._exit(k + 1)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_reads_on(folder):
    paths = [folder / name for name in (*WRITERS, "a.npy", "a.czi")]
    subprocess.run([sys.executable, "-c", FORK, *paths], check=True, timeout=60)  # exits with the number of a wrong one


STRIPS = """
import os, sys
from widefield.images import open_image

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024

for path in sys.argv[1:]:
    if child := os.fork():  # each has a peak of its own, and nothing is imported again
        os.waitpid(child, 0)
        continue
    image = open_image(path)
    image.read(0, 0, 8, 8)
    before = peak()
    _, height, width = image.shape
    for y in [*range(0, height, 100), *reversed(range(0, height, 100))]:
        image.read(y, 0, min(100, height - y), width)
    print(os.path.basename(path), peak() - before, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_strips_of_a_large_file_take_a_fraction_of_it(tmp_path):
    height, width = 8192, 8192
    tiles = {"tile": True, "tile_width": 256, "tile_height": 256}
    image = (pyvips.Image.black(width, height, bands=3) + 7).cast("uchar")
    for name, options in {"tiles.tif": tiles, "strips.tif": {}, "lzw.tif": {"compression": "lzw"}}.items():
        image.tiffsave(str(tmp_path / name), **options)
    np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (height, width, 3))[:] = 7
    paths = sorted(tmp_path.iterdir())
    result = subprocess.run([sys.executable, "-c", STRIPS, *paths], check=True, capture_output=True, text=True)
    peaks = dict(line.split() for line in result.stdout.splitlines())
    assert len(peaks) == len(paths) == 4
    for name, peak in peaks.items():
        assert int(peak) < height * width * 3 / 5, name


MANY = """
import sys
from widefield.images import open_image

for index, path in enumerate(sys.argv[1:]):
    image = open_image(path)
    image.read(0, 0, 256, image.shape[2])
    del image
    with open("/proc/self/status") as file:
        resident = next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) * 1024
    if index == 0:
        first = resident
print(resident - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_an_image_that_is_gone_leaves_nothing_in_memory(tmp_path):
    paths = [tmp_path / f"{index}.tif" for index in range(20)]
    pixels = (pyvips.Image.black(8192, 512, bands=3) + 7).cast("uchar")
    pixels.tiffsave(str(paths[0]), tile=True, tile_width=256, tile_height=256)
    for path in paths[1:]:
        path.hardlink_to(paths[0])
    result = subprocess.run([sys.executable, "-c", MANY, *paths], check=True, capture_output=True, text=True)
    assert int(result.stdout) < 3 * 256 * 8192 * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_lock_that_another_thread_holds_is_free_in_a_forked_process():
    code = """
import os, sys, threading
from widefield.images.formats import ForkSafeLock
lock, held, done = ForkSafeLock(), threading.Event(), threading.Event()
def hold():
    with lock:
        held.set()
        done.wait()
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if not child:
    with lock:
        os._exit(7)
try:
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
finally:
    done.set()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout == "7\n"
