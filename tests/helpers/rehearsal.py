"""An operator at work on a simulated cloud, with the commands of docs/cluster.md."""

import csv
import json
import os
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3

from carclass import s3 as s3_client
from carclass.sample.generate import write_sample
from tests.helpers.aws import IMAGE, put_image
from tests.helpers.cloud import REPO, Cloud, make_cloud
from tests.helpers.clusters import Job, descendants, wait_for
from tests.helpers.provisioner import in_namespace
from tests.helpers.runbook import Command, read_blocks, read_spans

PAGE = (REPO / "docs" / "cluster.md").read_text()
BUCKET, DASHBOARD = "my-bucket", 8265
ON_CPUS: dict[str, dict[str, Any]] = {
    "mask": {
        "detector": {"model": "sample", "weights": "sample", "short_side": 160, "num_proposals": 30},
        "use_gpu": False,
        "num_actors": 1,
        "part_rows": 8,
    },
    "train": {
        "parent": "sample",
        "model": {"architecture": "resnet26-narrow", "image_size": 64},
        "frozen": {"epochs": 1},
        "unfrozen": {"epochs": 2},
        "precision": "fp32",
        "use_gpu": False,
        "num_workers": 1,
    },
}
"""Settings added to the page's job: instances have the GPUs of their type as numbers only, and no network to fetch
weights from."""
COMMENT = re.compile(r"\s+#[^'\"]*$")


def to_options(settings: dict[str, Any], prefix: str = "--") -> str:
    """Return nested settings as options of a job."""
    words = [
        to_options(value, f"{prefix}{name}.") if isinstance(value, dict) else f"{prefix}{name} {json.dumps(value)}"
        for name, value in settings.items()
    ]
    return " ".join(words)


def interrupt(job: Job) -> None:
    """Send Ctrl-C to a command typed by the operator: to the processes of its group, as a terminal does."""
    for pid in descendants(job.process.pid):
        with suppress(ProcessLookupError):
            if os.getpgid(pid) == job.process.pid:
                os.kill(pid, signal.SIGINT)


@dataclass
class Done:
    """A finished command."""

    command: str
    status: int
    output: str
    seconds: float


@dataclass
class Rehearsal:
    """An operator: commands of the page, those run so far, and the values of its placeholders."""

    cloud: Cloud
    dashboard: Job | None = None
    """The command that keeps the dashboard's port forwarded."""
    history: list[Done] = field(default_factory=list)
    blocks: list[Command] = field(default_factory=lambda: read_blocks(PAGE))
    spans: list[Command] = field(default_factory=lambda: read_spans(PAGE))

    def command(self, words: str) -> Command:
        """Return the first command of the page's blocks that contains a text."""
        return next(each for each in self.blocks if words in each.text)

    def fill(self, text: str) -> str:
        """Fill in the page's placeholders: subnets and the image's digest."""
        text = re.sub(r"subnet-(\d)\b", lambda match: self.cloud.subnets[int(match[1]) - 1], text)
        return text.replace("sha256:…", IMAGE.partition("@")[2])

    def start(self, command: Command, more: str = "") -> Job:
        """Start a command of the page, with more words at its end."""
        line = self.fill(command.line)
        if "prepare_aws.py" in line:
            put_image()  # the page's digest, not that of the image that the page pushes
        return self.cloud.type(COMMENT.sub("", line) + more if more else line)

    def run(self, command: Command, more: str = "", seconds: float = 600) -> Done:
        """Run a command of the page."""
        begun = time.monotonic()
        job = self.start(command, more)
        status = job.process.wait(timeout=seconds)
        done = Done(command.text, status, job.log.read_text(), time.monotonic() - begun)
        self.history.append(done)
        return done

    def open_dashboard(self) -> None:
        """Start the command that forwards the dashboard's port, and wait until the head answers."""
        command = self.command("ray dashboard")
        self.dashboard = self.start(command)
        wait_for(lambda: self.ask_dashboard() != 0, *self.dashboard, seconds=120)
        self.history.append(Done(command.text, 0, "", 0))

    def close_dashboard(self) -> None:
        """End that command with Ctrl-C twice, as the page says."""
        assert self.dashboard is not None
        for _ in range(2):
            interrupt(self.dashboard)
            time.sleep(1)
        self.dashboard.process.wait(timeout=30)

    def submit(self, *, small: bool = True) -> Job:
        """Start the page's job, by default with settings for CPUs."""
        return self.start(self.command("submit.py"), f" {to_options(ON_CPUS)}" if small else "")

    def ask_dashboard(self) -> int:
        """Return the HTTP status of a request to the forwarded dashboard, 0 without an answer."""
        return in_namespace(self.cloud.operator.space, lambda: request("/api/version"))

    def ask_jobs(self, token: str) -> int:
        """Return the HTTP status of a request for the jobs with a token."""
        return in_namespace(self.cloud.operator.space, lambda: request("/api/jobs/", token))


def request(path: str, token: str = "") -> int:
    """Return the HTTP status of a request to the dashboard, 0 without an answer."""
    url = f"http://127.0.0.1:{DASHBOARD}{path}"
    try:
        headers = {"Authorization": f"Bearer {token}"}
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5).status
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return 0


def put_photos(folder: Path) -> None:
    """Upload the sample's photos to the page's bucket, in a folder per class."""
    write_sample(folder, train_per_class=4, test_per_class=2)
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    with (folder / "labels.csv").open() as file:
        for row in csv.DictReader(file):
            path = folder / "photos" / row["img_name"]
            if row["class"] and path.is_file():
                s3.upload_file(str(path), BUCKET, f"photos/{row['class']}/{path.name}")


@contextmanager
def rehearse(folder: Path) -> Iterator[Rehearsal]:
    """Create a cloud with photos and the page's image, and its operator."""
    s3_client.reset()
    put_photos(folder / "sample")
    with make_cloud(folder) as cloud:
        cloud.images.add(IMAGE)
        yield Rehearsal(cloud)
