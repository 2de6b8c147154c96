"""`import widefield` is light; that imports point one way is a check of `lint-imports`."""

import subprocess
import sys

import pytest

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
