"""The rooms of the house: imports point one way, and `import widefield` is light."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_imports_between_the_parts_point_one_way():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


LOADED = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [("widefield", {"torch", "lightning", "numpy", "pyvips"}), ("widefield.images", {"torch", "lightning"})],
)
def test_importing_a_part_loads_only_what_it_needs(module, unwanted):
    result = subprocess.run([sys.executable, "-c", LOADED, module], check=True, capture_output=True, text=True)
    assert not unwanted & set(result.stdout.split())


def test_every_public_name_says_where_it_comes_from():
    import widefield

    assert set(dir(widefield)) == set(widefield.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'; it has .*open_image"):
        _ = widefield.nothing
