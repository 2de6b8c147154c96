"""What all tests share."""

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # small tensors: threads cost more than they bring, above all with several test processes
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
