"""Two `jobs/ingest.py` with other settings on one name: one publishes, the other is refused in one paragraph."""

import subprocess
import sys
from pathlib import Path

import pytest

from carclass import storage
from carclass.data import dataset

REPO = Path(__file__).parents[2]


def start_ingest(root: Path, photos_folder: Path, max_side: int) -> subprocess.Popen[str]:
    config = root / f"{max_side}.yml"
    config.write_text(
        f"root: {root}\ningest:\n  photos: {photos_folder}/photos\n  labels: {photos_folder}/labels.csv\n"
        f"  max_side: {max_side}\n  max_quarantined: 1\n"
    )
    command = [sys.executable, str(REPO / "jobs" / "ingest.py"), "--config", str(config)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow  # 30 s: two jobs with a cluster each
def test_one_of_two_ingests_with_other_settings_publishes(tmp_path: Path, photos_folder: Path):
    jobs = [start_ingest(tmp_path, photos_folder, max_side) for max_side in (700, 701)]
    outputs = [job.communicate(timeout=300)[1] for job in jobs]
    assert sorted(job.returncode for job in jobs) == [0, 2], outputs
    refused = next(output for job, output in zip(jobs, outputs, strict=True) if job.returncode)
    (line,) = [line for line in refused.splitlines() if line.startswith("error: ")]
    assert "is in use by the job `ingest`" in line or "was made with other settings (max_side)" in line
    published = dataset.load_dataset(str(tmp_path), "v1")
    assert published.read(["key"]).num_rows == published.manifest["rows"]
    assert all(storage.exists(storage.join(published.uri, path)) for path in published.quarantine)
