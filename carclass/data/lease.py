"""Leases: exclusive use of a target on storage by one job, renewed in the background, taken over once they expire.

<target>/lease.json   owner, job, host and process; its age by the store's clock is the time since the last renewal

A job that was killed leaves its lease behind. On the same machine the next job takes it over at once; elsewhere it
watches the lease, until it is renewed (the owner lives, and the new job is refused) or expires.
"""

import logging
import os
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from carclass import storage
from carclass.data.formats import json_text
from carclass.data.layout import check_layout
from carclass.errors import UserError

log = logging.getLogger(__name__)
FILE = "lease.json"
RENEW_S = 10.0
"""Seconds between two renewals."""
EXPIRE_S = 60.0
"""Seconds after the last renewal until another job may take a lease over."""
POLL_S = 1.0
"""Seconds between two looks at another job's lease."""
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
"""Names of the files that storage renames once they are complete."""
BOOT_ID, PID_NAMESPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


class LeaseLostError(UserError):
    """Loss of a lease: another job has taken the target over."""


@dataclass(frozen=True)
class Holder:
    """Content of a lease."""

    owner: str
    """Unique id of this hold."""
    job: str
    host: str
    pid: int
    process: str
    """Start of the process, by which it is told from a later one with the same pid."""
    machine: str
    """Boot and pid namespace in which the pid counts; empty if unknown."""
    started: str
    renewals: int = 0

    @property
    def is_local(self) -> bool:
        """Return True if its process can be seen from here."""
        return self.machine == _machine() != ""

    @property
    def is_dead(self) -> bool:
        """Return True if its process is known to have ended."""
        return self.is_local and process_start(self.pid) != self.process

    def __str__(self) -> str:
        return f"the job `{self.job}` (host {self.host}, process {self.pid}, since {self.started})"


UNKNOWN = Holder("", "unknown", "unknown", 0, "", "", "unknown")
"""Holder of a lease that cannot be read, as after a power loss."""


class Lease:
    """Lease on a target, held in a `with` statement.

    If it is lost, which takes a pause longer than EXPIRE_S, the main thread is interrupted if it holds the lease.
    """

    def __init__(self, uri: str, job: str) -> None:
        self.uri, self.file = uri, storage.join(uri, FILE)
        pid, started = os.getpid(), datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        process = process_start(pid) or ""
        self.holder = Holder(uuid4().hex, job, socket.gethostname(), pid, process, _machine(), started)
        self.version, self.is_lost = "", False
        self._lock, self._released = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_renewing, name=f"lease of {uri}", daemon=True)
        self._in_main_thread = False
        self._new_folders: list[Path] = []

    def __enter__(self) -> Self:
        check_layout(self.uri)
        if (path := storage.local_path(self.uri)) is not None:
            self._new_folders = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
        self._acquire()
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._thread.start()
        remove_temporary_files(self.uri)
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        try:
            self.release()
        except KeyboardInterrupt:  # by the thread, while this one had already found the loss
            if not self.is_lost:
                raise
        # An interrupt by the thread, or a file that the next holder has removed.
        if self.is_lost and error is not None and not isinstance(error, UserError):
            raise self._lost_error() from error

    def release(self) -> None:
        """End the lease, if it is held. A job that wrote nothing leaves no folder behind."""
        if self._released.is_set() or not self._thread.is_alive():
            return
        with self._lock:  # after which the thread does not interrupt
            self._released.set()
        self._thread.join()
        with suppress(UserError, OSError):  # if storage is out of reach, the lease expires by itself
            try:
                self.is_lost = read_holder(self.file).owner != self.holder.owner
            except FileNotFoundError:  # the job that took it over has ended
                self.is_lost = True
            if not self.is_lost:
                remove_temporary_files(self.uri)  # of workers that were killed meanwhile
                storage.delete(self.file)
                for folder in self._new_folders:
                    folder.rmdir()  # fails where there is a result

    def check(self) -> None:
        """Renew the lease, before anything is published or deleted. Raise LeaseLostError if another job has it."""
        with self._lock:
            self.is_lost = self.is_lost or not self._renew()
        if self.is_lost:
            raise self._lost_error()

    def _renew(self) -> bool:
        """Write the lease if it is still this job's. Return False if it is not."""
        self.holder = replace(self.holder, renewals=self.holder.renewals + 1)
        storage.replace(self.file, self._content(), self.version)
        return self._is_mine()

    def _content(self) -> bytes:
        return json_text({"format": 1, **asdict(self.holder)}, indent=1).encode()

    def _is_mine(self) -> bool:
        """Return True if the lease is this job's, and note its version.

        Read after a conditional write, whose result is unknown if it was retried. The version is read before the
        owner: if the owner is this job then, the version is of its own content.
        """
        try:
            self.version = storage.stat(self.file).version
            return read_holder(self.file).owner == self.holder.owner
        except FileNotFoundError:
            return False

    def _acquire(self) -> None:
        """Take the lease, once it is free. Raise UserError if another job keeps it."""
        watched, since = None, time.monotonic()
        while True:
            try:
                found = storage.stat(self.file)
                other = read_holder(self.file)
            except FileNotFoundError:
                with suppress(FileNotFoundError):  # the folder that a job without results has removed meanwhile
                    storage.create(self.file, self._content())
                if self._is_mine():
                    return
                continue
            age = max(0.0, found.now - found.modified)  # negative if a clock has gone back
            waited = time.monotonic() - since if watched == found.version else 0.0
            if max(age, waited) > EXPIRE_S or other.is_dead:
                storage.replace(self.file, self._content(), found.version)
                if self._is_mine():
                    log.info("%s: %s was interrupted; taken over from %s", self.holder.job, self.uri, other)
                    return
            elif other.is_local or watched not in (None, found.version):
                raise UserError(self._in_use(other))
            elif watched is None:
                watched = found.version
                text = "%s: %s is leased by %s; waiting at most %.0f s for a sign of life"
                log.info(text, self.holder.job, self.uri, other, EXPIRE_S - age)
            time.sleep(POLL_S)

    def _in_use(self, other: Holder) -> str:
        return (
            f"{self.uri} is in use by {other}. Wait until it ends, or choose another name. If it has hung, end it: "
            f"its target can be taken over {EXPIRE_S:.0f} s after the last sign of life."
        )

    def _lost_error(self) -> LeaseLostError:
        try:
            other = f"{read_holder(self.file)} has taken it over"
        except (UserError, OSError):
            other = f"{FILE} was deleted"
        return LeaseLostError(
            f"{self.uri} is no longer leased by this job, which gave no sign of life for a while: {other}. This job "
            "published nothing more. Run the same command again when the other has ended."
        )

    def _keep_renewing(self) -> None:
        while not self._released.wait(RENEW_S):
            try:
                self.check()
            except LeaseLostError as error:
                log.warning("%s: %s", self.holder.job, error)
                with self._lock:
                    if self._in_main_thread and not self._released.is_set():
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return
            except (UserError, OSError) as error:  # storage is out of reach: tried again
                log.warning("%s: the lease of %s could not be renewed: %s", self.holder.job, self.uri, error)


def hold_lease(uri: str, job: str) -> Lease:
    """Return a lease on a target, for a `with` statement. Raise UserError there if a live job holds it."""
    return Lease(uri, job)


def find_worker(uri: str) -> Holder | None:
    """Return the job that is at work on a target now, as far as its lease tells, or None."""
    file = storage.join(uri, FILE)
    try:
        holder = read_holder(file)
        if holder.is_local:
            return None if holder.is_dead else holder
        found = storage.stat(file)
    except (UserError, OSError):  # without a lease; a message is no reason to fail
        return None
    return holder if found.now - found.modified <= EXPIRE_S else None


def read_holder(file: str) -> Holder:
    """Return the holder in a lease's file, UNKNOWN if it is damaged. Raise FileNotFoundError without a file."""
    data = storage.read_bytes(file)
    try:
        return TypeAdapter(Holder).validate_json(data, strict=True)
    except ValidationError:
        return UNKNOWN


def remove_temporary_files(uri: str) -> None:
    """Remove the files that interrupted writers have left below a local target.

    Those of its lease stay for a while: other jobs write them in the attempt to get it.
    """
    if (folder := storage.local_path(uri)) is None:
        return
    for path in Path(folder).rglob(".*.tmp"):
        with suppress(OSError):  # without permission, it stays
            of_lease = path.name.startswith(f".{FILE}.")
            if TEMPORARY.fullmatch(path.name) and not (of_lease and _is_recent(path, Path(folder, FILE))):
                path.unlink()


def _is_recent(path: Path, lease: Path) -> bool:
    return lease.stat().st_mtime - path.stat().st_mtime < EXPIRE_S


def process_start(pid: int) -> str | None:
    """Return the start of a process in ticks since boot, None if there is no such process or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    try:
        return f"{BOOT_ID.read_text(encoding='utf-8').strip()} {PID_NAMESPACE.stat().st_ino}"
    except OSError:
        return ""
