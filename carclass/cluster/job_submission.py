"""Job submission to a Ray cluster: uploads the code, and follows the job's log across lost connections."""

import asyncio
import logging
import os
import re
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
INPUTS = "carclass-inputs"
"""Key of a job's metadata for the digest of Submission."""


class Submission(NamedTuple):
    """A command to run on a cluster."""

    command: Sequence[str]
    uploads: Mapping[str, Path]  # files and folders, by their paths in the folder that the command runs in
    variables: Mapping[str, str]
    digest: str  # of the files and variables that a user gave, to tell jobs with the same command apart


class TimedClient(JobSubmissionClient):
    """A client of the job API whose requests end: without a time limit Ray's waits for ever."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=REQUEST_S, **options)


def submit_and_follow(address: str, submission: Submission) -> int:
    """Submit a command, or find it running with the same digest, and follow it; return its exit status.

    Raise UserError if the cluster is out of reach or refuses the token.
    """
    client = connect(address)
    with _unreachable(address):
        submission_id = _find_running(client, submission)
    is_new = submission_id is None
    submission_id = submission_id or f"carclass-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    stop = f"ray job stop --address {address} {submission_id}"  # Ray's command does not know the default address
    state = "may have been submitted" if is_new else "keeps running"
    try:
        if is_new:
            with _unreachable(address, f" The job may have been submitted as {submission_id}; `{stop}` stops it."):
                _submit(client, submission_id, submission)
            log.info("submit: submitted as %s to %s", submission_id, address)
            state = "keeps running"
        return asyncio.run(LogFollower(client, submission_id).follow())
    except KeyboardInterrupt:
        log.info("submit: the job %s. The same command follows it; `%s` stops it", state, stop)
        return 130


def _find_running(client: JobSubmissionClient, submission: Submission) -> str | None:
    """Return the id of a running job with the same command and digest, None if there is none."""
    entrypoint = shlex.join(submission.command)
    running = [job for job in client.list_jobs() if job.entrypoint == entrypoint and not job.status.is_terminal()]
    digests = {job.submission_id: (job.metadata or {}).get(INPUTS) for job in running if job.submission_id is not None}
    for submission_id, digest in digests.items():
        if digest == submission.digest:
            log.info("submit: the same command is already running as %s; following it", submission_id)
            return submission_id
    if digests:
        others = ", ".join(digests)
        log.info(
            "submit: the same command is running as %s, but with other files or variables; this is another job", others
        )
    return None


@contextmanager
def _unreachable(address: str, note: str = "") -> Iterator[None]:
    """Convert the errors of requests to UserError. note: end of its text."""
    try:
        yield
    except AuthenticationError as error:
        raise refused_token(address) from error
    except (*CONNECTION_ERRORS, KeyError) as error:
        raise UserError(
            f"no cluster answers at {address} ({_cause(error)}). Is its dashboard's port forwarded (docs/cluster.md)? "
            f"Otherwise give --address.{note}"
        ) from error


def _cause(error: Exception) -> str:
    """Return an error in a few words: the system's, if it has one."""
    text = " ".join(str(error).split())
    found = re.search(r"\[Errno -?\d+\] ([^'\")\]]+)", text)
    return found[1] if found else f"{type(error).__name__}: {text[:100]}"


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


def _submit(client: JobSubmissionClient, submission_id: str, submission: Submission) -> None:
    """Upload files and folders, and submit the job under a unique id."""
    with tempfile.TemporaryDirectory() as folder:
        for path, source in submission.uploads.items():
            target = Path(folder, path)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
        client.submit_job(
            entrypoint=shlex.join(submission.command),
            submission_id=submission_id,
            runtime_env={"working_dir": folder, "env_vars": dict(submission.variables)},
            metadata={INPUTS: submission.digest},
        )


class JobState(NamedTuple):
    """Status of a submitted job."""

    status: JobStatus
    exit_code: int | None
    message: str

    @classmethod
    def from_details(cls, job: JobDetails) -> "JobState":
        """Convert the answer of Ray's client, without the log's end in its message, which is printed already."""
        return cls(job.status, job.driver_exit_code, (job.message or "").partition(", last available logs")[0])

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
