"""First config file of photos below an S3 prefix: found by listing, with a few photos read."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from carclass.config import cli
from carclass.data import photo
from tests.helpers.photos import scene

JOB = Path(__file__).parents[2] / "jobs" / "init.py"
JPEG = photo.encode(scene(60, 100))


@pytest.mark.parametrize("labels", [False, True], ids=["folders of classes", "a table"])
def test_photos_below_a_prefix_are_counted_and_sampled(
    labels: bool, s3: Any, bucket: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    keys = [f"{name}/{i}.jpg" for name in ("audi", "bmw") for i in range(10)]
    for key in [key.replace("/", "-") for key in keys] if labels else keys:
        s3.put_object(Bucket=bucket, Key=f"cars/{key}", Body=JPEG + key.encode())
    arguments = [f"s3://{bucket}/cars"]
    if labels:
        table = "image,label\n" + "".join(f"{key.replace('/', '-')},{key[:3]}\n" for key in keys)
        s3.put_object(Bucket=bucket, Key="labels.csv", Body=table.encode())
        arguments += ["--labels", f"s3://{bucket}/labels.csv"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["init.py", *arguments])
    runpy.run_path(str(JOB))["main"]()
    printed = capsys.readouterr().out
    assert "train 12, val 4 (20% held out), test 4 (20% held out)" in printed
    assert "100x60 (20 photos sampled)" in printed
    settings = cli.parse_job("", "ingest", ["--config", "my.yml"]).ingest
    assert settings is not None
    assert (settings.photos, settings.labels) == (f"s3://{bucket}/cars", arguments[2] if labels else None)
