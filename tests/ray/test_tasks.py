"""Tasks that crash, or report a user's mistake. Their functions are nested, so that Ray sends them by value."""

import gc
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from carclass.cluster import connection, resources, tasks
from carclass.cluster.tasks import COUNT_EVERY_S, MAX_CRASHES, run_tasks
from carclass.errors import UserError

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_results_come_from_all_items():
    assert sorted(run_tasks(abs, range(-20, 0))) == list(range(1, 21))


def test_the_clusters_cpus_are_not_counted_for_every_task(monkeypatch: pytest.MonkeyPatch):
    counts = []
    count = ray.cluster_resources
    monkeypatch.setattr(ray, "cluster_resources", lambda: counts.append(1) or count())
    started = time.monotonic()
    assert len(list(run_tasks(abs, range(100)))) == 100
    assert len(counts) <= 1 + (time.monotonic() - started) / COUNT_EVERY_S


def test_tasks_beyond_those_that_are_waited_for_are_noticed_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks, "WINDOW", 1)

    def sleep(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    assert list(run_tasks(sleep, [3, 0, 0.1])) == [0, 0.1, 3]


def test_tasks_whose_nodes_are_lost_and_not_replaced_end_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    head = [{**node, "Resources": {}, "Labels": {resources.WORK_LABEL: "head"}} for node in ray.nodes()]
    monkeypatch.setattr(resources, "MAX_WAIT_S", 1.5)
    monkeypatch.setattr(tasks, "CHECK_EVERY_S", 0.1)

    def items() -> Iterator[int]:
        yield 8
        monkeypatch.setattr(ray, "nodes", lambda: head)

    with (
        caplog.at_level(logging.INFO, "carclass"),
        pytest.raises(UserError, match=r"`a task` needs 1 CPU\(s\); they did"),
    ):
        list(run_tasks(time.sleep, items()))
    assert "waiting for 1 CPU(s), 1 s so far" in caplog.messages


@pytest.mark.slow  # 10 s: five workers start
def test_a_task_that_crashes_again_and_again_stops_the_job_with_a_remedy():
    def crash(_: int) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    with pytest.raises(UserError, match=rf"crashed {MAX_CRASHES} times in a row without progress .* more memory"):
        list(run_tasks(crash, [1]))


@pytest.mark.slow  # 15 s: ten workers start
def test_a_task_that_makes_progress_may_crash_more_often(tmp_path: Path):
    file = tmp_path / "crashes"

    def crash_at_first(allowed: int) -> int:
        with file.open("a") as log:
            log.write(".")
        if file.stat().st_size <= allowed:
            os.kill(os.getpid(), signal.SIGSEGV)
        return file.stat().st_size

    assert list(run_tasks(crash_at_first, [MAX_CRASHES + 1], lambda: file.stat().st_size)) == [MAX_CRASHES + 2]


def test_a_users_mistake_found_by_a_task_is_reported_without_the_tasks_traceback():
    def refuse(number: int) -> int:
        if number == 3:
            raise UserError("3 is refused. Use 4.")
        return number

    with pytest.raises(UserError, match=r"^3 is refused. Use 4.$"):
        list(run_tasks(refuse, range(5)))


def test_tasks_that_fail_after_the_first_print_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_IGNORE_UNHANDLED_ERRORS", raising=False)
    connection.connect()

    def refuse(seconds: float) -> None:
        time.sleep(seconds)
        raise UserError(f"{seconds} is refused.")

    worker = logging.getLogger("ray._private.worker")
    worker.addHandler(caplog.handler)
    try:
        with pytest.raises(UserError, match="is refused"):
            list(run_tasks(refuse, [1, 0, 1]))
        time.sleep(2)
        gc.collect()  # Ray reports an error that nobody read when it is deleted
        time.sleep(1)
    finally:
        worker.removeHandler(caplog.handler)
    assert "Unhandled error" not in caplog.text
