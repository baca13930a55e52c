"""The clusters of tests as the jobs' own."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def treated_as_own() -> Iterator[None]:
    """Make jobs treat the cluster as one of their own process, which they can do without for few photos or a worker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("carclass.cluster.connection._owns_cluster", True)
        yield
