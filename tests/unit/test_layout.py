"""Layout of targets: what stands in the way of a result is refused before any work, names are free."""

import time
from pathlib import Path

import pytest

from carclass.data import lease
from carclass.data.lease import hold_lease
from carclass.errors import UserError


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "datasets" / "v1")


@pytest.mark.parametrize("place", ["datasets", "datasets/v1", "datasets/v1/parts", "datasets/v1/a/frozen"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_in_place_of_a_folder_is_refused_at_once(tmp_path: Path, uri: str, place: str, kind: str):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch() if kind == "file" else path.symlink_to("nothing")
    refuse_at_once(uri, f"{path} is a {'file' if kind == 'file' else 'broken link'}, but jobs write a folder there.")


@pytest.mark.parametrize("name", ["lease.json", "manifest.json", "a/best.json"])
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_folder_in_place_of_a_file_is_refused_at_once(uri: str, name: str, kind: str):
    path = Path(uri, name)
    path.parent.mkdir(parents=True)
    path.mkdir() if kind == "folder" else path.symlink_to("nothing")
    refuse_at_once(uri, f"{path} is a {'folder' if kind == 'folder' else 'broken link'}, but jobs write a file there.")


def refuse_at_once(uri: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(UserError) as caught, hold_lease(uri, "ingest"):
        pass
    assert str(caught.value).startswith(message)
    assert time.monotonic() - started < 0.9 * lease.POLL_S


@pytest.mark.parametrize("name", ["parts", "v1.json", "best.json"])
def test_a_target_may_have_any_name(tmp_path: Path, name: str):
    for _ in range(2):
        with hold_lease(f"{tmp_path}/predictions/{name}", "predict") as held:
            Path(held.uri, "x").touch()


def test_predictions_may_have_the_name_of_a_file(tmp_path: Path):
    Path(tmp_path, "run", "predictions", "best.json").mkdir(parents=True)
    with hold_lease(f"{tmp_path}/run", "train") as held:
        held.check()


def test_the_parts_of_a_dataset_may_be_a_link_to_another_disk(tmp_path: Path, uri: str):
    Path(uri).mkdir(parents=True)
    Path(tmp_path, "disk").mkdir()
    Path(uri, "parts").symlink_to(tmp_path / "disk")
    with hold_lease(uri, "ingest") as held:
        held.check()
