"""A job on a cluster: sent with its code, followed to its end, whatever happens to the connection in between."""

import asyncio
import logging
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from carclass.errors import UserError

log = logging.getLogger(__name__)
CODE = ("carclass", "jobs")
"""Folders of the checkout that travel."""
CONFIG_FOLDER = (".yml", ".yaml")
MAX_FILE_BYTES = 20_000_000
"""Bytes that no config file has, so that photos and weights don't travel by accident."""
POLL_S, SILENT_S, GIVE_UP_S = 5.0, 60.0, 600.0
"""Seconds between looks at a job; without a line until the log is fetched whole; without an answer until we stop."""
LOST = (ConnectionError, requests.RequestException, aiohttp.ClientError, RuntimeError, TimeoutError)
"""What Ray's client raises when the connection or the server's part of it is gone."""


def submit_and_follow(address: str, command: Sequence[str], checkout: Path) -> int:
    """Sends a command, or finds it running, and follows it; returns its exit status.

    The cluster starts it in a copy of the checkout's code. UserError when there is no cluster, or no way in.
    """
    files = _config_files(command, checkout)
    client = connect(address)
    entrypoint = shlex.join(command)
    known = [job for job in client.list_jobs() if job.entrypoint == entrypoint and not job.status.is_terminal()]
    if running := [job.submission_id for job in known if job.submission_id is not None]:
        name = running[0]
        log.info("submit: this very command runs already as %s; following it", name)
    else:
        name = _send(client, entrypoint, checkout, files)
        log.info("submit: sent as %s to %s", name, address)
    try:
        return asyncio.run(Follower(client, name).follow())
    except KeyboardInterrupt:
        log.info("submit: the job goes on. The same command follows it; `ray job stop %s` ends it", name)
        return 130


def connect(address: str) -> JobSubmissionClient:
    """A client of a cluster's job API; UserError when nobody answers or the token is not the cluster's."""
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise UserError(
            f"{address} refuses the token. Give the cluster's own in RAY_AUTH_TOKEN, or in ~/.ray/auth_token with "
            "RAY_AUTH_MODE=token."
        ) from error
    except (ConnectionError, requests.RequestException) as error:
        raise UserError(
            f"no cluster answers at {address}. Is its dashboard's port forwarded (docs/cluster.md)? "
            "Else give --address."
        ) from error


def _config_files(command: Sequence[str], checkout: Path) -> list[Path]:
    """Files of the checkout that a command names and that are no part of its code, relative to it.

    UserError for config files outside, which would not be there on the cluster, and for large ones.
    """
    named = []
    for word in command:
        path = Path(word.split("=", 1)[-1] if word.startswith("--") else word)
        if not path.is_file():
            continue
        full = path.resolve()
        if not full.is_relative_to(checkout):
            if full.suffix in CONFIG_FOLDER:
                raise UserError(f"{path} lies outside {checkout} and does not travel. Put it in there.")
            continue  # on a file system that the cluster shares, or else the job says that it is missing
        if full.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path} has {full.stat().st_size:,} bytes: only code and configs travel. Put it on S3.")
        named.append(full.relative_to(checkout))
    return [path for path in named if path.parts[0] not in CODE]


def _send(client: JobSubmissionClient, entrypoint: str, checkout: Path, files: Sequence[Path]) -> str:
    """The submission's id. It can't be used twice, so it has chance in it."""
    name = f"carclass-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory() as folder:
        for part in CODE:
            shutil.copytree(checkout / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
        for file in files:
            Path(folder, file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkout / file, Path(folder, file))
        runtime_env = {"working_dir": folder}
        return str(client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=runtime_env))


class State(NamedTuple):
    """How far a job is."""

    status: JobStatus
    exit_code: int | None
    message: str

    @classmethod
    def of(cls, job: JobDetails) -> "State":
        """What a client says of it."""
        return cls(job.status, job.driver_exit_code, job.message or "")

    @property
    def exit_status(self) -> int:
        """Of a job that is over: its own where it has one."""
        if self.status == JobStatus.SUCCEEDED:
            return 0
        return self.exit_code or 1


class Follower:
    """Prints a job's log once, from its beginning to its end, over as many connections as it takes."""

    def __init__(self, client: JobSubmissionClient, name: str) -> None:
        self.client, self.name = client, name
        self.printed = 0

    async def follow(self) -> int:
        """The job's exit status, when it is over. UserError when the cluster doesn't answer for ten minutes."""
        answered = time.monotonic()
        while True:
            try:
                state = await self._tail_until_over()
                self._print_from_start(await asyncio.to_thread(self.client.get_job_logs, self.name))
                log.info("submit: %s is over: %s %s", self.name, state.status.value, state.message)
                return state.exit_status
            except AuthenticationError as error:
                raise UserError(f"the cluster no longer takes the token ({error}).") from error
            except LOST as error:
                if await self._answers():
                    answered = time.monotonic()
                if time.monotonic() - answered > GIVE_UP_S:
                    raise UserError(
                        f"no answer for {GIVE_UP_S / 60:.0f} minutes; {self.name} may still run. "
                        "The same command follows it."
                    ) from error
                log.info("submit: lost the connection (%s); the job goes on, trying again", type(error).__name__)
                await asyncio.sleep(POLL_S)

    async def _answers(self) -> bool:
        with suppress(*LOST):
            await asyncio.to_thread(self.client.get_job_info, self.name)
            return True
        return False

    async def _tail_until_over(self) -> State:
        """Prints what comes while the job runs; a stream may end, or fall silent, long before the job does."""
        stream, seen, heard = self.client.tail_job_logs(self.name), 0, time.monotonic()
        line: asyncio.Task[str] | None = asyncio.ensure_future(_next(stream))
        try:
            while True:
                if line is None:
                    await asyncio.sleep(POLL_S)
                elif (await asyncio.wait([line], timeout=POLL_S))[0]:
                    seen, heard = self._print(line.result(), seen), time.monotonic()
                    line = asyncio.ensure_future(_next(stream)) if line.result() else None
                    continue
                state = State.of(await asyncio.to_thread(self.client.get_job_info, self.name))
                if state.status.is_terminal():
                    return state
                if time.monotonic() - heard > SILENT_S:
                    self._print_from_start(await asyncio.to_thread(self.client.get_job_logs, self.name))
                    heard = time.monotonic()
        finally:
            if line is not None:
                line.cancel()

    def _print(self, text: str, start: int) -> int:
        """Prints what is new of a piece of the log that starts at a position; returns where it ends."""
        end = start + len(text)
        if end > self.printed:
            sys.stdout.write(text[max(0, self.printed - start) :])
            sys.stdout.flush()
            self.printed = end
        return end

    def _print_from_start(self, whole: str) -> None:
        self._print(whole, 0)


async def _next(stream: AsyncIterator[str]) -> str:
    """The next piece, or nothing at the end."""
    return await anext(stream, "")
