"""Local folders on clusters of several hosts.

Below /proc/self/cwd each process has a folder of its own, as each host has its own disk.
"""

from pathlib import Path
from typing import Any

import pytest
import ray

from carclass.cluster.shared_paths import check_shared
from carclass.errors import UserError

OWN = "/proc/self/cwd"


@pytest.fixture
def two_nodes(ray_cluster: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Report two nodes, and return the working directory of this process."""
    nodes: list[Any] = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: nodes * 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"photo")
    return tmp_path


@pytest.mark.parametrize(("setting", "path"), [("root", OWN), ("ingest.photos", f"{OWN}/photos")])
def test_a_folder_that_other_nodes_lack_is_refused(two_nodes: Path, setting: str, path: str):
    with pytest.raises(UserError, match=rf"`{setting}`: {path} is not the same on node .*Use an s3:// prefix"):
        check_shared({setting: path})
    assert [file.name for file in two_nodes.iterdir()] == ["photos"]


def test_a_shared_folder_and_a_bucket_are_accepted(two_nodes: Path):
    check_shared({"root": str(two_nodes), "ingest.photos": str(two_nodes / "photos"), "predict.photos": "s3://b/c"})
    assert [file.name for file in two_nodes.iterdir()] == ["photos"]


def test_a_folder_of_the_only_host_is_accepted(ray_cluster: str, two_nodes: Path, monkeypatch: pytest.MonkeyPatch):
    nodes = ray.nodes()[:1]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    check_shared({"root": OWN})
