"""Failures on a simulated cloud: the messages that a user of docs/cluster.md gets, after how long, and their cost.

All drills share a cluster; each adds a row to a table, which the last test prints.
"""

import re
import shlex
import time
from collections.abc import Iterator
from typing import NamedTuple

import boto3
import pytest

from tests.helpers.cloud import Instance
from tests.helpers.clusters import Job, wait_for
from tests.helpers.faulty_s3 import Fault
from tests.helpers.hosts import missing_requirement
from tests.helpers.rehearsal import BUCKET, Rehearsal, rehearse
from tests.helpers.runbook import Command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement())),
]  # 900 s
STEPS = """
import ray, time
@ray.remote(num_cpus=1)
def step():
    time.sleep(1)
for number in range(600):
    ray.get(step.remote())
    print("finished step", number, flush=True)
"""
"""A job of ten minutes on one CPU of a node."""
STOP = """
import time
from ray.job_submission import JobSubmissionClient

client = JobSubmissionClient("http://127.0.0.1:8265")
running = [job.submission_id for job in client.list_jobs() if not job.status.is_terminal()]
for job in running:
    client.stop_job(job)
while not all(client.get_job_status(job).is_terminal() for job in running):
    time.sleep(0.1)
"""
SETTLED_S = 90
"""Seconds for which a failure that ends by itself, or does not end, is watched."""


class Row(NamedTuple):
    """A drill's result."""

    event: str
    message: str
    """Text that the user sees."""
    seconds: float
    """Time until then."""
    minutes: float
    """Minutes of instances from the event until the job goes on, or has ended, or is given up by the drill."""


class Drills:
    """The operator of a running cluster, and the results."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal, self.cloud = rehearsal, rehearsal.cloud
        self.rows: list[Row] = []

    def begin(self) -> None:
        """Note the time and cost at an event."""
        self.begun, self.paid = time.monotonic(), self.cloud.minutes()

    def wait(self, job: Job, text: str, seconds: float = 300) -> float:
        """Wait for a text in a job's log, and return the seconds since the event."""
        wait_for(lambda: text in job.log.read_text(), *job, seconds=seconds)
        return time.monotonic() - self.begun

    def end(self, event: str, message: str, seconds: float) -> None:
        """Add a row with the cost since the event."""
        plain = re.sub(r"\x1b\[\d+m", "", message)[:200]
        self.rows.append(Row(event, plain, seconds, self.cloud.minutes() - self.paid))
        print(self.rows[-1], flush=True)

    def start_steps(self) -> Job:
        """Submit a job that needs one CPU, and wait until it works."""
        submit = self.rehearsal.command("submit.py")
        options = submit.text.partition(" -- ")[0]
        job = self.rehearsal.start(Command(f"{options} -- python -c {shlex.quote(STEPS)}", submit.settings))
        wait_for(lambda: len(numbers(job)) > 1, *job, seconds=300)
        return job

    def stop_jobs(self) -> None:
        """Stop all jobs and wait for their ends: the same command would follow a job that is about to end."""
        settings = self.rehearsal.command("submit.py").settings
        assert self.rehearsal.run(Command(f".venv/bin/python -c {shlex.quote(STOP)}", settings)).status == 0

    def lose(self, instance: Instance) -> None:
        """Let AWS terminate an instance without notice."""
        boto3.client("ec2").terminate_instances(InstanceIds=[instance.id])
        self.cloud.update()

    def lose_workers(self) -> None:
        """Let AWS terminate all instances but the head."""
        for instance in self.cloud.running():
            if instance.kind != "head":
                self.lose(instance)

    def monitor_log(self) -> str:
        """Return the output of the page's command for nodes that do not start."""
        command = next(span for span in self.rehearsal.spans if "monitor.log" in span.text)
        return self.rehearsal.run(command).output


@pytest.fixture(scope="module")
def drills(s3, tmp_path_factory) -> Iterator[Drills]:
    """Start a cluster with a forwarded dashboard."""
    with rehearse(tmp_path_factory.mktemp("drills")) as rehearsal:
        for words in ("prepare_aws.py", "ray up"):
            done = rehearsal.run(rehearsal.command(words))
            assert done.status == 0, done.output[-3000:]
        rehearsal.open_dashboard()
        drills = Drills(rehearsal)
        yield drills
        print_table(drills.rows)


@pytest.fixture(autouse=True)
def repaired(drills: Drills) -> Iterator[None]:
    """Stop the jobs of a drill and mend its failures, whether it passed or not."""
    images = {*drills.cloud.images}
    yield
    drills.cloud.nodes.no_spot = None
    drills.cloud.nodes.refuse = lambda request: None
    drills.cloud.nodes.faults.clear()
    drills.cloud.images.update(images)
    drills.stop_jobs()


def print_table(rows: list[Row]) -> None:
    """Print the results as a Markdown table, without colours and the ends of long messages."""
    print("\n| event | what the user sees | known after | instance-minutes |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row.event} | {row.message} | {row.seconds:.0f} s | {row.minutes:.1f} |")


def test_a_cut_tunnel_is_told_and_the_log_goes_on(drills: Drills) -> None:
    job = drills.start_steps()
    drills.begin()
    for session in [each for each in drills.cloud.provisioner.sessions if each.tunnels]:
        session.cut()
    known = drills.wait(job, "lost the connection")
    lines = len(numbers(job))
    wait_for(lambda: len(numbers(job)) > lines + 1, *job, seconds=120)
    drills.end("tunnel cut", last_line(job, "lost the connection"), known)
    assert numbers(job) == list(range(len(numbers(job))))


def numbers(job: Job) -> list[int]:
    """Return the steps in a job's log."""
    return [int(number) for number in re.findall(r"finished step (\d+)", job.log.read_text())]


def last_line(job: Job, text: str) -> str:
    """Return the last line of a log that contains a text."""
    return [line for line in job.log.read_text().splitlines() if text in line][-1]


def test_a_job_goes_on_after_the_loss_of_a_worker(drills: Drills) -> None:
    job = drills.start_steps()
    lines = job.log.read_text().count("\n")
    drills.begin()
    drills.lose_workers()
    before = numbers(job)[-1]
    wait_for(lambda: numbers(job)[-1] > before + 2, *job, seconds=400)
    known = time.monotonic() - drills.begun
    seen = [line for line in job.log.read_text().splitlines()[lines:] if "finished step" not in line]
    drills.end("worker lost", " / ".join(seen[:3]) or "nothing; a new node continues", known)
    assert drills.cloud.running("read")


def watch_pending(drills: Drills, event: str, reason: str, seconds: float = 2 * SETTLED_S) -> str:
    """Submit the page's job while no node can start, and return the autoscaler's log once the job's has the reason."""
    drills.begin()
    job = drills.rehearsal.submit()
    wait_for(lambda: "assumed" in job.log.read_text(), *job, seconds=120)
    known = drills.wait(job, reason, seconds)
    time.sleep(max(0.0, SETTLED_S - known))
    drills.end(event, last_line(job, reason), known)
    monitor = drills.monitor_log()
    drills.stop_jobs()
    job.process.wait(timeout=60)
    print(job.log.read_text(), monitor[-3000:], flush=True)
    return monitor


def test_a_waiting_job_tells_that_there_is_no_spot_capacity(drills: Drills) -> None:
    drills.lose_workers()
    drills.cloud.nodes.no_spot = "InsufficientInstanceCapacity"
    assert "InsufficientInstanceCapacity" in watch_pending(drills, "no spot capacity", "InsufficientInstanceCapacity")


def test_a_waiting_job_tells_that_a_quota_is_reached(drills: Drills) -> None:
    drills.lose_workers()
    drills.cloud.nodes.refuse = lambda request: "VcpuLimitExceeded"
    assert "VcpuLimitExceeded" in watch_pending(drills, "quota reached", "VcpuLimitExceeded")


def test_denied_access_to_s3_ends_the_job_with_the_reason(drills: Drills) -> None:
    drills.lose_workers()
    drills.cloud.nodes.faults.append(Fault(403, pattern=f"/{BUCKET}"))
    drills.begin()
    job = drills.rehearsal.submit()
    assert job.process.wait(timeout=400) != 0
    drills.end("S3 denied", last_line(job, "error"), time.monotonic() - drills.begun)
    print(job.log.read_text(), flush=True)
    assert re.search("403|[Dd]enied", job.log.read_text())


def test_a_replaced_token_locks_the_old_one_out(drills: Drills) -> None:
    job = drills.start_steps()
    drills.stop_jobs()
    job.process.wait(timeout=60)
    file = drills.cloud.home / ".ray" / "carclass" / "auth_token"
    old = file.read_text()
    drills.begin()
    file.unlink()
    for words in ("prepare_aws.py", "ray up"):
        done = drills.rehearsal.run(drills.rehearsal.command(words))
        assert done.status == 0, done.output[-3000:]
    wait_for(lambda: drills.rehearsal.ask_dashboard() != 0, *drills.rehearsal.dashboard, seconds=120)
    ready = time.monotonic() - drills.begun
    assert drills.rehearsal.ask_jobs(file.read_text()) == 200
    assert drills.rehearsal.ask_jobs(old) == 403
    drills.start_steps()  # on workers that have the new token
    drills.end("token replaced", "the dashboard with the new token", ready)


def test_the_loss_of_the_head_is_told_with_a_remedy(drills: Drills) -> None:
    job = drills.start_steps()
    (head,), workers = drills.cloud.running("head"), drills.cloud.running("read")
    assert workers
    drills.begin()
    drills.lose(head)
    known = drills.wait(job, "lost the connection")
    drills.end("head lost", last_line(job, "lost the connection"), known)
    wait_for(lambda: all(worker.ended or raylets(worker) == 0 for worker in workers), *job, seconds=300)
    drills.end("head lost: raylets of its workers", "nothing: they exit", time.monotonic() - drills.begun)
    wait_for(lambda: all(worker.ended for worker in workers), *job, seconds=300)
    drills.end("head lost: workers", "nothing: they shut down", time.monotonic() - drills.begun)
    done = drills.rehearsal.run(drills.rehearsal.command("ray up"))
    assert done.status == 0, done.output[-3000:]
    assert job.process.wait(timeout=300) != 0
    drills.end("head lost, `ray up`", last_line(job, "error"), time.monotonic() - drills.begun)
    assert "run the same command again" in job.log.read_text()
    drills.start_steps()


def test_a_waiting_job_tells_that_the_image_is_missing_and_instances_are_started_no_more(
    drills: Drills,
) -> None:  # the last test: nodes for reading pause after it
    drills.lose_workers()
    drills.cloud.images.clear()
    before = len(drills.cloud.instances)
    monitor = watch_pending(drills, "image missing", "the setup of the last 2 nodes of type read failed", 400)
    assert "Ray installation failed" in monitor  # its reason is in monitor.err
    assert len(drills.cloud.instances) == before + 2
    assert drills.cloud.running("read") == []


def raylets(instance: Instance) -> int:
    """Count the raylets on an instance."""
    return int(instance.machine.run(["pgrep", "-c", "raylet"], {"PATH": "/usr/bin:/bin"})[1].split()[0])
