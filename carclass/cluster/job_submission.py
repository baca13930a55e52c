"""Job submission to a Ray cluster: uploads the code, and follows the job's log across lost connections."""

import asyncio
import logging
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from carclass.cluster.address import PROBE_S, refused_token
from carclass.errors import UserError

log = logging.getLogger(__name__)
POLL_S, REQUEST_S, SILENT_S, GIVE_UP_S = 5.0, 30.0, 60.0, 600.0
"""Seconds between status requests; without answer to a request; without output before the whole log is fetched; without
answer to any request before an error."""
CONNECTION_ERRORS = (ConnectionError, requests.RequestException, aiohttp.ClientError, RuntimeError, TimeoutError)
"""Errors of Ray's client on a lost connection or a failed server."""


class TimedClient(JobSubmissionClient):
    """A client of the job API whose requests end: without a time limit Ray's waits for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=REQUEST_S, **options)


def submit_and_follow(
    address: str, command: Sequence[str], uploads: Mapping[str, Path], variables: Mapping[str, str]
) -> int:
    """Submit a command, or find it running, and follow it; return its exit status.

    The cluster runs it with these environment variables, in a folder with copies of the uploaded files and folders, by
    their paths there. Raise UserError if the cluster is out of reach or refuses the token.
    """
    client = connect(address)
    with _unreachable(address):
        entrypoint = shlex.join(command)
        same = [job for job in client.list_jobs() if job.entrypoint == entrypoint and not job.status.is_terminal()]
        if running := [job.submission_id for job in same if job.submission_id is not None]:
            submission_id = running[0]
            log.info("submit: the same command is already running as %s; following it", submission_id)
        else:
            submission_id = _submit(client, entrypoint, uploads, variables)
            log.info("submit: submitted as %s to %s", submission_id, address)
    try:
        return asyncio.run(LogFollower(client, submission_id).follow())
    except KeyboardInterrupt:
        stop = f"ray job stop --address {address} {submission_id}"  # Ray's command does not know the default address
        log.info("submit: the job keeps running. The same command follows it; `%s` stops it", stop)
        return 130


@contextmanager
def _unreachable(address: str) -> Iterator[None]:
    """Convert the errors of requests to UserError."""
    try:
        yield
    except AuthenticationError as error:
        raise refused_token(address) from error
    except (*CONNECTION_ERRORS, KeyError) as error:
        cause = " ".join(str(error).split())[:200]
        raise UserError(
            f"no cluster answers at {address} ({cause}). Is its dashboard's port forwarded (docs/cluster.md)? "
            "Otherwise give --address. A job that was submitted keeps running: the same command follows it."
        ) from error


def connect(address: str) -> JobSubmissionClient:
    """Return a client of a cluster's job API. Raise UserError if none answers in PROBE_S or it refuses the token."""
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise UserError(
            f"the address is {address!r}: give the URL of the cluster's dashboard, such as http://127.0.0.1:8265, by "
            "--address or RAY_API_SERVER_ADDRESS."
        )
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray's client prefers it, and then RAY_ADDRESS, to its argument
    with _unreachable(address):
        requests.get(f"{address.rstrip('/')}/api/version", timeout=PROBE_S)
        return TimedClient(address)


def _submit(
    client: JobSubmissionClient, entrypoint: str, uploads: Mapping[str, Path], variables: Mapping[str, str]
) -> str:
    """Upload files and folders, by path in the job's folder, submit the job and return its unique id."""
    submission_id = f"carclass-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    with tempfile.TemporaryDirectory() as folder:
        for path, source in uploads.items():
            target = Path(folder, path)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        runtime_env = {"working_dir": folder, "env_vars": dict(variables)}
        return str(client.submit_job(entrypoint=entrypoint, submission_id=submission_id, runtime_env=runtime_env))


class JobState(NamedTuple):
    """Status of a submitted job."""

    status: JobStatus
    exit_code: int | None
    message: str

    @classmethod
    def from_details(cls, job: JobDetails) -> "JobState":
        """Convert the answer of Ray's client."""
        return cls(job.status, job.driver_exit_code, job.message or "")

    @property
    def exit_status(self) -> int:
        """Exit status of a finished job: its driver's, or 1 if it has none."""
        if self.status == JobStatus.SUCCEEDED:
            return 0
        return self.exit_code or 1


class LogFollower:
    """Printer of a job's log: each line once, over any number of connections."""

    def __init__(self, client: JobSubmissionClient, submission_id: str) -> None:
        self.client, self.submission_id = client, submission_id
        self.num_printed = 0
        """Characters of the log printed so far."""

    async def follow(self) -> int:
        """Print the log until the job ends; return its exit status.

        Raise UserError if the cluster does not answer for GIVE_UP_S, or does not know the job.
        """
        answered = time.monotonic()
        while True:
            try:
                state = await self._tail()
                await self._print_whole_log()
                log.info("submit: %s ended: %s %s", self.submission_id, state.status.value, state.message)
                return state.exit_status
            except AuthenticationError as error:
                raise UserError(f"the cluster no longer accepts the token ({error}).") from error
            except CONNECTION_ERRORS as error:
                with suppress(*CONNECTION_ERRORS):
                    await self._check_known()
                    answered = time.monotonic()
                if time.monotonic() - answered > GIVE_UP_S:
                    raise UserError(
                        f"no answer for {GIVE_UP_S / 60:.0f} minutes; {self.submission_id} may still be running. "
                        "The same command follows it."
                    ) from error
                log.info("submit: lost the connection (%s); the job keeps running, retrying", type(error).__name__)
                await asyncio.sleep(POLL_S)

    async def _check_known(self) -> None:
        """Raise UserError if the cluster that answers is not the one that was given the job."""
        jobs = await asyncio.to_thread(self.client.list_jobs)
        if all(job.submission_id != self.submission_id for job in jobs):
            raise UserError(
                f"the cluster does not know {self.submission_id}: its head was started anew, and the job is lost. "
                "What it wrote is kept: run the same command again to resume it."
            )

    async def _get_state(self) -> JobState:
        """Request the job's status."""
        return JobState.from_details(await asyncio.to_thread(self.client.get_job_info, self.submission_id))

    async def _tail(self) -> JobState:
        """Print the log stream until the job ends; the stream may end or stall before."""
        stream, position, received = self.client.tail_job_logs(self.submission_id), 0, time.monotonic()
        pending: asyncio.Task[str] | None = asyncio.ensure_future(_next_chunk(stream))
        try:
            while True:
                if pending is None:
                    await asyncio.sleep(POLL_S)
                elif (await asyncio.wait([pending], timeout=POLL_S))[0]:
                    position, received = self._print(pending.result(), position), time.monotonic()
                    pending = asyncio.ensure_future(_next_chunk(stream)) if pending.result() else None
                    continue
                state = await self._get_state()
                if state.status.is_terminal():
                    return state
                if time.monotonic() - received > SILENT_S:
                    await self._print_whole_log()
                    received = time.monotonic()
        finally:
            if pending is not None:
                pending.cancel()

    def _print(self, text: str, start: int) -> int:
        """Print the new part of a chunk that starts at a position of the log; return the position of its end."""
        end = start + len(text)
        if end > self.num_printed:
            sys.stdout.write(text[max(0, self.num_printed - start) :])
            sys.stdout.flush()
            self.num_printed = end
        return end

    async def _print_whole_log(self) -> None:
        """Fetch the whole log and print its new part."""
        self._print(await asyncio.to_thread(self.client.get_job_logs, self.submission_id), 0)


async def _next_chunk(stream: AsyncIterator[str]) -> str:
    """Return the next chunk of a log, or an empty string at its end."""
    return await anext(stream, "")
