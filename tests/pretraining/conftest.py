"""What tests of pretraining have in common."""

from pathlib import Path

import pytest

from tests.pretraining.tiny import write_images


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))
