"""Thread limit of the unit tests, which see no cluster, and settings for speed."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """Limit torch to one thread: the tests' networks are too small for more, and pytest's processes share the CPUs."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def no_joined_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide a cluster that earlier tests of this process have joined: jobs would not look for another one."""
    if "ray" in sys.modules:
        monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimate importance from fewer resamples and smaller forests, for speed."""
    from carclass.tuning import importance

    monkeypatch.setattr(importance, "NUM_RESAMPLES", 5)
    monkeypatch.setattr(importance, "NUM_TREES", 8)
