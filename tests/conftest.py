"""What all tests share."""

import gc

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # small tensors: threads cost more than they bring, above all with several test processes
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


class _Generator(torch.Generator):
    """Draws where the tests make their tensors."""

    def __new__(cls, device: str | None = None) -> "_Generator":
        return super().__new__(cls, device or torch.get_default_device())  # type: ignore[call-arg]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", help="where the tests make their tensors: `pytest tests/streaming --device cuda`")


def pytest_configure(config: pytest.Config) -> None:
    if device := config.getoption("--device"):
        torch.set_default_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.Generator = _Generator  # type: ignore[assignment, misc]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("cpu") and device:
            item.add_marker(pytest.mark.skip(reason=f"on {device}"))


def pytest_collection_finish() -> None:
    """Leave what the imports of the tests made, which lives to the end, out of all garbage collections to come."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or extension modules tell of leaks at the exit


_WITH_THE_CHECK = (
    *("test_first_check", "test_functions_and_hooks", "test_effects", "test_mutations", "test_it_streams"),
    "test_local",
)


@pytest.fixture(autouse=True)
def without_the_check_at_first_use(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests compare with plain PyTorch themselves; the check runs in its own and in those that act as users do."""
    if request.path.stem not in _WITH_THE_CHECK and not {"integration", "cli"} & set(request.path.parts):
        monkeypatch.setattr("widefield.streaming.module.verify_at_first_use", lambda *args, **options: None)
