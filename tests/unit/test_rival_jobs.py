"""Jobs beside each other on one name: one publishes, nothing of others is deleted, the others get one paragraph."""

import random
from pathlib import Path

import pytest

from carclass import storage
from carclass.data import dataset
from tests.helpers import rival_jobs

SEEDS = [pytest.param(seed, marks=pytest.mark.slow if seed else ()) for seed in range(20)]
"""About a second each."""


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_jobs_on_one_name_publish_one_complete_dataset(tmp_path: Path, seed: int, count: int):
    root, mine = str(tmp_path / "root"), tmp_path / "root" / "datasets" / "v1" / "parts" / "mine.parquet"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    results = rival_jobs.run_jobs(root, rival_jobs.make_plans(random.Random(1000 * count + seed), count), tmp_path)
    assert [result["failed"] for result in results if "failed" in result] == []
    assert [result["refused"] for result in results if "\n" in result.get("refused", "")] == []
    published = dataset.load_dataset(root, "v1")
    assert {result["published"] for result in results if "published" in result} <= {
        published.manifest["settings"]["seed"]
    }
    assert sorted(published.read(["key"])["key"].to_pylist()) == list(rival_jobs.KEYS)
    assert all(storage.exists(storage.join(published.uri, path)) for path in published.quarantine)
    assert mine.read_bytes() == b"mine"
