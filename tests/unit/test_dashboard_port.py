"""Ports of the dashboards of jobs that start their own Ray at the same time."""

import socket
import tempfile
import threading
from pathlib import Path

import pytest

from carclass.cluster.connection import hold_dashboard_port


@pytest.fixture(autouse=True)
def _own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # so that it is restored


def test_jobs_that_start_at_once_get_different_ports():
    second: list[int] = []

    def start() -> None:
        with hold_dashboard_port() as port:
            second.append(port)

    with socket.socket() as dashboard:
        with hold_dashboard_port() as first:
            job = threading.Thread(target=start)
            job.start()
            job.join(0.2)
            assert not second, "it did not wait for the dashboard of the first job"
            dashboard.bind(("127.0.0.1", first))
            dashboard.listen()
        job.join(5)
    assert second
    assert first not in second


def test_the_lock_of_a_job_that_failed_to_start_is_free():
    def fail() -> None:
        with hold_dashboard_port():
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with hold_dashboard_port() as port:
        assert port >= 8265
