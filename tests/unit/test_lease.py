"""Leases of targets on storage: one holder at a time, renewal, expiry, takeover, loss."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from carclass import storage
from carclass.data import lease
from carclass.data.lease import LeaseLostError, hold_lease
from carclass.errors import UserError

HOLD = "import sys, time; from carclass.data.lease import hold_lease; hold_lease(sys.argv[1], 'ingest').__enter__(); "


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "datasets" / "v1")


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renew and expire within a second."""
    monkeypatch.setattr(lease, "RENEW_S", 0.05)
    monkeypatch.setattr(lease, "EXPIRE_S", 0.5)
    monkeypatch.setattr(lease, "POLL_S", 0.02)


@pytest.fixture
def interrupts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record interrupts of the main thread instead of sending them."""
    sent: list[int] = []
    monkeypatch.setattr(lease.signal, "pthread_kill", lambda _, number: sent.append(number))
    return sent


def lease_file(uri: str) -> Path:
    return Path(uri, lease.FILE)


def change_holder(uri: str, **fields: Any) -> None:
    """Give a lease the fields of another holder."""
    content = json.loads(lease_file(uri).read_bytes())
    storage.write_bytes(str(lease_file(uri)), json.dumps(content | fields).encode())


def leave_lease(uri: str, **fields: Any) -> None:
    """Write the lease of a job on another host that has ended without releasing it."""
    with hold_lease(uri, "mask"):
        content = lease_file(uri).read_bytes()
    storage.write_bytes(str(lease_file(uri)), content)
    change_holder(uri, **({"owner": "other", "host": "far", "machine": "another"} | fields))


def make_older(uri: str, seconds: float) -> None:
    old = time.time() - seconds
    os.utime(lease_file(uri), (old, old))


def test_a_lease_names_its_holder(uri: str):
    with hold_lease(uri, "ingest"):
        content = json.loads(lease_file(uri).read_bytes())
    assert (content["job"], content["pid"]) == ("ingest", os.getpid())


def test_a_lease_is_released_at_the_end(uri: str):
    with hold_lease(uri, "ingest"):
        pass
    assert not lease_file(uri).exists()


def test_a_lease_is_released_after_an_error(uri: str):
    with pytest.raises(KeyError), hold_lease(uri, "ingest"):
        raise KeyError
    assert not lease_file(uri).exists()


def test_a_second_job_is_refused_in_one_paragraph(uri: str):
    with hold_lease(uri, "ingest"), pytest.raises(UserError) as caught, hold_lease(uri, "mask"):
        pass
    message = str(caught.value)
    assert "\n" not in message
    assert f"{uri} is in use by the job `ingest` (host " in message
    assert f"process {os.getpid()}, since 20" in message
    assert "Wait until it ends, or choose another name." in message


def test_a_refused_job_leaves_the_lease_to_its_holder(uri: str):
    with hold_lease(uri, "ingest") as held:
        with pytest.raises(UserError), hold_lease(uri, "mask"):
            pass
        held.check()


def test_leases_of_different_targets_are_independent(uri: str):
    with hold_lease(uri, "ingest"), hold_lease(f"{uri}b", "ingest"):
        pass


@pytest.mark.usefixtures("brief")
def test_a_lease_is_renewed_beyond_its_expiry(uri: str):
    with hold_lease(uri, "ingest"):
        time.sleep(0.8)
        with pytest.raises(UserError, match="in use"), hold_lease(uri, "mask"):
            pass


def test_an_expired_lease_of_another_host_is_taken_over_at_once(uri: str):
    leave_lease(uri)
    make_older(uri, lease.EXPIRE_S + 1)
    started = time.monotonic()
    with hold_lease(uri, "ingest") as held:
        held.check()
    assert time.monotonic() - started < 0.9 * lease.POLL_S


@pytest.mark.usefixtures("brief")
def test_a_lease_of_another_host_is_awaited_until_it_expires(uri: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "carclass")
    leave_lease(uri)
    with hold_lease(uri, "ingest") as held:
        held.check()
    assert "is leased by the job `mask` (host far" in caplog.text
    assert "waiting at most" in caplog.text


@pytest.mark.usefixtures("brief")
def test_a_lease_from_before_the_clock_went_back_expires_as_others(uri: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "carclass")
    leave_lease(uri)
    make_older(uri, -7200)
    with hold_lease(uri, "ingest") as held:
        held.check()
    assert "waiting at most 0 s" in caplog.text


@pytest.mark.usefixtures("brief")
def test_a_job_is_refused_once_the_lease_of_another_host_is_renewed(uri: str):
    leave_lease(uri)
    timer = threading.Timer(0.2, lambda: change_holder(uri, renewals=7))
    timer.start()
    with pytest.raises(UserError, match=r"in use by the job `mask` .host far"), hold_lease(uri, "ingest"):
        pass
    timer.join()


def test_the_lease_of_a_killed_process_is_taken_over_at_once(uri: str):
    holder = subprocess.Popen([sys.executable, "-c", f"{HOLD} print('held', flush=True); time.sleep(60)", uri],
                              stdout=subprocess.PIPE)  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    started = time.monotonic()
    with hold_lease(uri, "ingest") as held:
        held.check()
    assert time.monotonic() - started < 0.9 * lease.POLL_S


def test_a_later_process_with_the_same_pid_is_not_the_holder(uri: str):
    with hold_lease(uri, "mask"):
        content = json.loads(lease_file(uri).read_bytes())
    storage.write_bytes(str(lease_file(uri)), json.dumps(content | {"owner": "other", "process": "1"}).encode())
    with hold_lease(uri, "ingest") as held:
        held.check()


def test_a_pid_of_another_container_says_nothing(uri: str):
    leave_lease(uri, pid=2**22 + 1, process="1")
    assert not lease.read_holder(str(lease_file(uri))).is_dead


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b"\xff"])
def test_a_damaged_lease_expires(uri: str, content: bytes):
    storage.write_bytes(str(lease_file(uri)), content)
    with hold_lease(uri, "ingest") as held:
        held.check()


@pytest.mark.parametrize("field", [{"pid": "1"}, {"pid": None}, {"renewals": "x"}, {"host": 3}])
def test_a_lease_with_a_value_of_another_type_is_damaged(uri: str, field: dict[str, Any]):
    leave_lease(uri, **field)
    assert lease.read_holder(str(lease_file(uri))) == lease.UNKNOWN


def test_a_lease_that_is_out_of_reach_for_a_moment_is_not_lost(uri: str, monkeypatch: pytest.MonkeyPatch):
    def fail(_: str) -> bytes:
        raise storage.StorageError("out of reach")

    with hold_lease(uri, "ingest") as held:
        with monkeypatch.context() as patched:
            patched.setattr(storage, "read_bytes", fail)
            with pytest.raises(storage.StorageError):
                held.check()
        held.check()


# Targets


def test_a_job_that_wrote_nothing_leaves_no_folder(tmp_path: Path, uri: str):
    with pytest.raises(KeyError), hold_lease(uri, "ingest"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("existed", [False, True])
def test_folders_with_results_and_those_of_others_are_kept(uri: str, existed: bool):
    if existed:
        Path(uri).mkdir(parents=True)
    with hold_lease(uri, "ingest"):
        if not existed:
            Path(uri, "draft.json").touch()
    assert Path(uri).exists()


@pytest.mark.usefixtures("brief")
def test_one_of_several_takes_an_expired_lease(uri: str):
    for _ in range(10):
        leave_lease(uri)
        make_older(uri, 10)
        held, refused = [], []

        def compete(held: list[str] = held, refused: list[str] = refused) -> None:
            try:
                with hold_lease(uri, "ingest") as mine:
                    held.append(mine.holder.owner)
                    time.sleep(0.2)
                    mine.check()
            except UserError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=compete) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(held), len(refused)) == (1, 2)


def test_a_holder_that_was_replaced_may_not_go_on(uri: str):
    with hold_lease(uri, "ingest") as held:
        change_holder(uri, owner="other", job="mask", host="far")
        with pytest.raises(LeaseLostError, match=r"no longer leased by this job.*`mask` .host far.*nothing more"):
            held.check()


def test_a_replaced_holder_leaves_the_lease_of_the_other(uri: str):
    with hold_lease(uri, "ingest"):
        change_holder(uri, owner="other")
    assert lease.read_holder(str(lease_file(uri))).owner == "other"


def test_a_holder_whose_lease_was_deleted_may_not_go_on(uri: str):
    with hold_lease(uri, "ingest") as held:
        lease_file(uri).unlink()
        with pytest.raises(LeaseLostError, match="was deleted"):
            held.check()


@pytest.mark.usefixtures("brief")
def test_a_loss_interrupts_the_holder(uri: str, interrupts: list[int]):
    with hold_lease(uri, "ingest"):
        change_holder(uri, owner="other")
        time.sleep(0.3)
    assert interrupts == [lease.signal.SIGINT]


@pytest.mark.usefixtures("brief")
def test_a_loss_ends_the_work_with_its_reason(uri: str):
    def work() -> None:
        change_holder(uri, owner="other")
        time.sleep(10)

    with pytest.raises(LeaseLostError, match="no longer leased"), hold_lease(uri, "ingest"):
        work()


@pytest.mark.usefixtures("brief")
def test_a_loss_found_by_both_threads_is_told_once(uri: str, monkeypatch: pytest.MonkeyPatch):
    kill = lease.signal.pthread_kill

    def kill_late(*target: int) -> None:
        held._released.wait(0.5)
        kill(*target)

    def work() -> None:
        change_holder(uri, owner="other")
        time.sleep(0.2)
        held.check()

    monkeypatch.setattr(lease.signal, "pthread_kill", kill_late)
    held = hold_lease(uri, "ingest")
    with pytest.raises(LeaseLostError, match="no longer leased"), held:
        work()


def test_a_file_removed_by_the_next_holder_is_explained(uri: str):
    def work() -> None:
        change_holder(uri, owner="other")
        Path(uri, "part").read_bytes()

    with pytest.raises(LeaseLostError, match="no longer leased"), hold_lease(uri, "ingest"):
        work()


def test_a_file_removed_by_a_holder_that_has_ended_is_explained(uri: str):
    def work() -> None:
        lease_file(uri).unlink()
        Path(uri, "part").read_bytes()

    with pytest.raises(LeaseLostError, match="was deleted"), hold_lease(uri, "ingest"):
        work()


def test_an_interrupt_by_the_user_stays_one(uri: str):
    with pytest.raises(KeyboardInterrupt), hold_lease(uri, "ingest"):
        raise KeyboardInterrupt


@pytest.mark.usefixtures("brief")
def test_a_storage_that_is_out_of_reach_for_a_while_costs_no_lease(uri: str, monkeypatch: pytest.MonkeyPatch):
    with hold_lease(uri, "ingest") as held, ExitStack() as stack:
        patched = stack.enter_context(pytest.MonkeyPatch.context())

        def fail(*_: object) -> bool:
            raise OSError("out of reach")

        patched.setattr(storage, "replace", fail)
        time.sleep(0.2)
        patched.undo()
        held.check()


def test_temporary_files_of_interrupted_writers_are_removed(uri: str):
    leftover, own = Path(uri, "parts", f".a.parquet.{'0' * 32}.tmp"), Path(uri, "parts", ".notes.tmp")
    own.parent.mkdir(parents=True)
    leftover.touch()
    own.touch()
    with hold_lease(uri, "ingest"):
        assert [path.name for path in own.parent.iterdir()] == [".notes.tmp"]


def test_temporary_files_of_writers_killed_meanwhile_are_removed_at_the_end(uri: str):
    leftover = Path(uri, "parts", f".a.parquet.{'0' * 32}.tmp")
    with hold_lease(uri, "ingest"):
        leftover.parent.mkdir(parents=True)
        leftover.touch()
    assert not leftover.exists()


@pytest.mark.parametrize(("age", "stays"), [(1, True), (lease.EXPIRE_S + 5, False)])
def test_the_attempt_of_another_job_to_get_the_lease_is_not_disturbed(uri: str, age: float, stays: bool):
    attempt = Path(uri, f".lease.json.{'0' * 32}.tmp")
    attempt.parent.mkdir(parents=True)
    attempt.touch()
    os.utime(attempt, (time.time() - age,) * 2)
    with hold_lease(uri, "ingest"):
        assert attempt.exists() == stays
