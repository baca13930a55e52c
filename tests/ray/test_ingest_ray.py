"""Ingestion on a Ray cluster: complete, idempotent, resumable, with the same result from all kinds of sources."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from carclass import storage
from carclass.config.schema import IngestSettings
from carclass.data import dataset, photo, publishing
from carclass.data.quarantine import Reason
from carclass.errors import UserError
from carclass.ingestion import ingest
from carclass.ingestion.ingest import ingest_photos
from carclass.ingestion.survey import survey_source
from carclass.sample.generate import FIRST_ODDITY, ODDITIES, file_name
from carclass.sample.models import MODELS
from carclass.tools.benchmarks import scale

JOB = Path(__file__).parents[2] / "jobs" / "ingest.py"

pytestmark = pytest.mark.usefixtures("ray_cluster")

Rows = list[dict[str, Any]]
Contents = Callable[[dataset.Dataset], tuple[Rows, Rows]]


def settings(folder: Path, **overrides: Any) -> IngestSettings:
    default = {"photos": str(folder / "photos"), "labels": str(folder / "labels.csv")}
    return IngestSettings.model_validate(default | overrides)


def assert_exact_shares(rows: Rows) -> None:
    """Check that a fifth of the train photos of each class, to one photo, is in val."""
    counts = Counter((row["label"], row["split"]) for row in rows)
    for label in {label for label, _ in counts}:
        number = counts[label, "val"] + counts[label, "train"]
        assert abs(counts[label, "val"] - 0.2 * number) <= 1


def odd_keys(kind: str) -> list[str]:
    return [file_name(FIRST_ODDITY + i) for i, oddity in enumerate(ODDITIES) if oddity.kind == kind]


# The sample, end to end


def test_every_input_is_a_row_or_in_quarantine(ingested: dataset.Dataset, contents: Contents, photos_folder: Path):
    rows, quarantine = contents(ingested)
    keys = [row["key"] for row in [*rows, *quarantine]]
    labelled = {line.split(",")[0] for line in (photos_folder / "labels.csv").read_text().splitlines()[1:]}
    assert sorted(keys) == sorted(labelled | {path.name for path in (photos_folder / "photos").iterdir()})
    assert ingested.manifest["inputs"] == ingested.manifest["rows"] + ingested.manifest["quarantined"] == len(keys)


def test_oddities_of_the_sample_are_quarantined_with_the_right_reason(ingested: dataset.Dataset, contents: Contents):
    _, quarantine = contents(ingested)
    expected = {
        "truncated": "truncated",
        "text": "not_an_image",
        "empty": "empty",
        "one_pixel": "too_small",
        "missing": "missing_file",
        "unlabelled": "no_label",
        "conflicting_labels": "label_conflict",
    }
    reasons = {key: reason for kind, reason in expected.items() for key in odd_keys(kind)}
    reasons[odd_keys("train_in_test")[0]] = "leakage"
    assert {row["key"]: row["reason"] for row in quarantine} == reasons
    assert ingested.manifest["reasons"] == dict(Counter(reasons.values()))


def test_every_reason_is_in_the_vocabulary_and_has_a_detail(ingested: dataset.Dataset, contents: Contents):
    _, quarantine = contents(ingested)
    assert {row["reason"] for row in quarantine} <= set(Reason)
    assert all(row["detail"] for row in quarantine)


def test_unusual_photos_become_upright_rgb_rows(ingested: dataset.Dataset, contents: Contents):
    rows = {row["key"]: row for row in contents(ingested)[0]}
    for kind in ("cmyk", "exif_rotated", "grayscale", "png_16_bit", "png_transparent"):
        (key,) = odd_keys(kind)
        pixels = photo.decode(rows[key]["image"])
        assert pixels.shape == (rows[key]["height"], rows[key]["width"], 3)
        assert rows[key]["image"].startswith(b"\xff\xd8")
        assert rows[key]["width"] > rows[key]["height"]


def test_an_ordinary_photo_keeps_its_bytes_and_is_identified_by_them(
    ingested: dataset.Dataset, contents: Contents, photos_folder: Path
):
    row = contents(ingested)[0][0]
    source = (photos_folder / "photos" / row["key"]).read_bytes()
    assert (row["image"], row["image_id"]) == (source, storage.sha256(source))


def test_val_is_an_exact_share_of_the_train_photos(ingested: dataset.Dataset, contents: Contents, photos_folder: Path):
    lines = (photos_folder / "labels.csv").read_text().splitlines()[1:]
    subsets = {key: subset for key, _, subset in (line.rsplit(",", 2) for line in lines)}
    rows = contents(ingested)[0]
    assert all((row["split"] == "test") == (subsets[row["key"]] == "test") for row in rows)
    assert_exact_shares(rows)
    assert ingested.manifest["splits"] == dict(Counter(row["split"] for row in rows))
    assert ingested.manifest["splits"]["test"] == 21  # two of each class, and one with a copy in train


def test_no_photo_is_in_two_splits_or_has_two_labels(ingested: dataset.Dataset, contents: Contents):
    kept: dict[str, tuple[str, str]] = {}
    for row in contents(ingested)[0]:
        assert kept.setdefault(row["image_id"], (row["split"], row["label"])) == (row["split"], row["label"])
    assert len(kept) == len(contents(ingested)[0]) - 1  # one pair of copies with the same label


def test_classes_are_sorted_by_name(ingested: dataset.Dataset):
    assert ingested.classes == sorted(model.name for model in MODELS)


# Idempotence and resuming


def test_a_second_run_writes_nothing(
    ingested: dataset.Dataset, photos_folder: Path, files_below: Callable[[str], dict[str, tuple[int, int]]]
):
    root = ingested.uri.removesuffix("/datasets/v1")
    before = files_below(root)
    again = ingest_photos(root, settings(photos_folder))
    assert again == ingested
    assert files_below(root) == before


def test_photos_with_a_new_time_of_modification_alone_make_no_new_version(
    ingested: dataset.Dataset, photos_folder: Path, files_below: Callable[[str], dict[str, tuple[int, int]]]
):
    root = ingested.uri.removesuffix("/datasets/v1")
    before, times = files_below(root), {path: path.stat().st_mtime_ns for path in (photos_folder / "photos").iterdir()}
    try:
        for path in times:
            os.utime(path)
        assert ingest_photos(root, settings(photos_folder), update=True) == ingested
    finally:
        for path, time_ns in times.items():
            os.utime(path, ns=(time_ns, time_ns))
    assert files_below(root) == before


def test_the_size_of_parts_does_not_change_the_dataset(ingested: dataset.Dataset, photos_folder: Path):
    root = ingested.uri.removesuffix("/datasets/v1")
    assert ingest_photos(root, settings(photos_folder, part_rows=7)) == ingested


def test_other_settings_under_the_same_name_are_refused(ingested: dataset.Dataset, photos_folder: Path):
    root = ingested.uri.removesuffix("/datasets/v1")
    with pytest.raises(UserError, match=r"made with other settings \(val_fraction\)"):
        ingest_photos(root, settings(photos_folder, val_fraction=0.3))


@pytest.fixture
def killed(ray_cluster: str, photos_folder: Path, tmp_path: Path) -> str:
    """Kill a job after its first parts, and return its root."""
    config_file = tmp_path / "config.yml"
    config_file.write_text(
        f"root: {tmp_path}\ningest:\n  photos: {photos_folder}/photos\n  labels: {photos_folder}/labels.csv\n"
        "  part_rows: 2\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster}
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            [sys.executable, str(JOB), "--config", str(config_file)], env=environment, stdout=log, stderr=log
        )
        try:
            parts = tmp_path / "datasets" / "v1" / "parts"
            while len(list(parts.glob("*.parquet"))) < 4:  # up to three are rewritten without leaks and conflicts
                assert job.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.005)
        finally:
            job.send_signal(signal.SIGKILL)
            job.wait()
    return str(tmp_path)


def test_a_killed_job_is_resumed_with_the_same_result(
    killed: str, ingested: dataset.Dataset, photos_folder: Path, contents: Contents
):
    uri = dataset.dataset_uri(killed, "v1")
    assert dataset.find_dataset(killed, "v1") is None
    first = set(storage.list_files(uri))
    resumed = ingest_photos(killed, settings(photos_folder))
    assert contents(resumed) == contents(ingested)
    assert first & set(storage.list_files(uri)), "all parts of the killed job were rewritten"


class KilledError(Exception):
    """Simulated SIGKILL."""


def test_a_job_killed_between_two_groups_of_leaks_quarantines_the_same_photos(
    photos_folder: Path, tmp_path: Path, ingested: dataset.Dataset, contents: Contents, monkeypatch: pytest.MonkeyPatch
):
    written: list[str] = []
    write_part = publishing.write_part

    def write_or_kill(uri: str, folder: str, rows: pa.Table, *args: Any) -> str:
        reasons = set(rows["reason"].to_pylist()) if folder == "quarantine" else set()
        if reasons & {"leakage", "label_conflict"}:
            written.extend(rows["key"].to_pylist())
            if len(written) == 3:
                raise KilledError
        return write_part(uri, folder, rows, *args)

    monkeypatch.setattr(ingest, "QUARANTINE_ROWS", 1)
    with monkeypatch.context() as patched:
        patched.setattr(publishing, "write_part", write_or_kill)
        with pytest.raises(KilledError):
            ingest_photos(str(tmp_path), settings(photos_folder))
    assert contents(ingest_photos(str(tmp_path), settings(photos_folder))) == contents(ingested)


def test_photos_written_by_two_processes_are_deduplicated(
    photos_folder: Path, tmp_path: Path, ingested: dataset.Dataset, contents: Contents
):
    """Write parts as a process that was wrongly considered dead does, in other batches."""
    ingest_settings = settings(photos_folder)
    identity = ingest_settings.model_dump(mode="json", exclude={"dataset", "part_rows"})
    keys = ["000000.jpg", "000001.jpg", "000002.jpg"]
    rows = {row["key"]: row for row in contents(ingested)[0]}
    for batch in (keys[:2], keys[1:]):
        table = pa.Table.from_pylist([rows[key] for key in batch], dataset.ROW)
        publishing.write_part(dataset.dataset_uri(str(tmp_path), "v1"), "parts", table, identity)
    assert contents(ingest_photos(str(tmp_path), ingest_settings)) == contents(ingested)


# Many keys


@pytest.mark.slow  # 20 s
def test_thousands_of_photos_have_one_row_each_with_the_right_label_and_split(ray_cluster: str, tmp_path: Path):
    scale.write_photos(tmp_path / "many", 4000)
    ingest_settings = IngestSettings(
        photos=str(tmp_path / "many/buckets/photos"), labels=str(tmp_path / "many/labels.csv"), part_rows=100
    )
    published = ingest_photos(str(tmp_path), ingest_settings)
    expected = {}
    for row in csv.DictReader((tmp_path / "many/labels.csv").open()):
        path = next((tmp_path / "many/buckets/photos").glob(f"{row['class'].replace(' ', '_')}/*/{row['img_name']}"))
        key = str(path.relative_to(tmp_path / "many/buckets/photos"))
        expected[key] = (storage.sha256(path.read_bytes()), row["class"], row["subset"])
    rows = published.read(["key", "image_id", "label", "split"]).to_pylist()
    assert len(rows) == 4000
    subsets = {"val": "train", "train": "train", "test": "test"}
    assert {row["key"]: (row["image_id"], row["label"], subsets[row["split"]]) for row in rows} == expected
    assert_exact_shares(rows)
    assert len(published.part_uris) == 40


# Other sources


def test_an_archive_gives_the_same_dataset_as_a_folder(
    photos_folder: Path, tmp_path: Path, ingested: dataset.Dataset, contents: Contents
):
    def pack(seconds: int) -> None:
        """Pack the photos, with a time of modification that is later by some seconds."""
        with tarfile.open(tmp_path / "photos.tgz", "w:gz", compresslevel=1) as archive:
            archive.add(
                photos_folder / "photos", ".", filter=lambda info: info.replace(mtime=info.mtime + seconds, deep=False)
            )

    pack(0)
    ingest_settings = settings(photos_folder, photos=str(tmp_path / "photos.tgz"), part_rows=20)
    published = ingest_photos(str(tmp_path), ingest_settings)
    assert contents(published) == contents(ingested)
    pack(7)
    assert ingest_photos(str(tmp_path), ingest_settings, update=True) == published


def write_noise(folder: Path, names: Sequence[str], seed: int = 0) -> None:
    """Write a photo of random pixels for each name."""
    for i, name in enumerate(names, start=seed):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo.encode(np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)))


@pytest.mark.slow  # 10 s
def test_conflicts_and_leaks_stay_in_quarantine_when_other_photos_are_added(tmp_path: Path, ray_cluster: str):
    folder = tmp_path / "photos"
    write_noise(folder, ["train/a/0", "train/a/1", "train/b/2", "train/b/3", "val/a/4", "val/b/5", "test/a/6"])
    shutil.copy(folder / "train/a/0.png", folder / "train/b/conflict.png")
    shutil.copy(folder / "test/a/6.png", folder / "train/a/leak.png")
    ingest_settings = IngestSettings(photos=str(folder), max_quarantined=1)
    expected = {
        "train/a/0.png": "label_conflict",
        "train/b/conflict.png": "label_conflict",
        "train/a/leak.png": "leakage",
    }
    for number in range(3):
        published = ingest_photos(str(tmp_path), ingest_settings, update=True)
        rows = publishing.read_written(published.uri, "quarantine", ["key", "reason"], [*published.quarantine])
        assert {row["key"]: row["reason"] for row in rows.to_pylist()} == expected
        assert expected.keys().isdisjoint(published.read(["key"])["key"].to_pylist())
        write_noise(folder, [f"train/b/new{number}"], seed=10 + number)


def test_a_folder_per_class_needs_no_labels(ingested: dataset.Dataset, photos_folder: Path, tmp_path: Path):
    expected = {}
    for line in (photos_folder / "labels.csv").read_text().splitlines()[1:]:
        key, label, subset = line.rsplit(",", 2)
        if key < file_name(40):
            label = label.replace("/", "-")
            path = tmp_path / "photos" / subset / label / key
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(photos_folder / "photos" / key, path)
            expected[f"{subset}/{label}/{key}"] = (label, subset)
    (tmp_path / "photos" / ".DS_Store").write_bytes(b"")
    published = ingest_photos(str(tmp_path), IngestSettings(photos=str(tmp_path / "photos"), val_fraction=0))
    rows = published.read(["key", "label", "split"]).to_pylist()
    assert {row["key"]: (row["label"], row["split"]) for row in rows} == expected
    assert published.manifest["reasons"] == {"junk": 1}


def test_a_survey_counts_what_is_then_ingested(photos_folder: Path, tmp_path: Path):
    for i, path in enumerate(sorted((photos_folder / "photos").iterdir())[:60]):
        folder = tmp_path / "cars" / f"class {i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.jpg").write_bytes(path.read_bytes())
    (tmp_path / "cars" / "notes.txt").write_text("not a photo")
    found = survey_source(str(tmp_path / "root"), str(tmp_path / "cars"), None)
    published = ingest_photos(str(tmp_path / "root"), found.settings)
    usable = published.manifest["inputs"] - published.manifest["quarantined"]
    assert usable == sum(found.splits.values())
    assert published.manifest["splits"] == found.splits
    assert published.manifest["reasons"] == {reason: number for reason, (number, _) in found.rejected.items()}


def test_a_dataset_without_usable_photos_is_refused_with_the_reasons(tmp_path: Path):
    for name in ("A/x.jpg", "B/y.jpg"):
        storage.write_bytes(str(tmp_path / "photos" / name), b"no photo")
    message = r"photos that are not in quarantine \(2 not_an_image\) have no class; training needs at least two"
    with pytest.raises(UserError, match=message):
        ingest_photos(str(tmp_path), IngestSettings(photos=str(tmp_path / "photos")))


# Mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"photos": "{tmp}/nowhere"}, r"`ingest.photos`: no folder .*/nowhere"),
        ({"photos": "{tmp}/nowhere.tgz"}, r"`ingest.photos`: no archive .*/nowhere.tgz"),
        ({"labels": "{tmp}/nowhere.csv"}, r"`ingest.labels`: .*/nowhere.csv cannot be read"),
        ({"labels": "{tmp}/columns.csv"}, r"columns.csv: no column class;"),
        ({"labels": "{tmp}/one_class.csv"}, r"one_class.csv has 1 class, but training needs at least 2"),
        ({"labels": "{tmp}/others.csv"}, r"no label of `ingest.labels` .* names a file of .*have different names"),
        ({"num_classes": 11}, r"labels.csv has 10 classes, but `ingest.num_classes` is 11"),
        ({"labels": None}, r"no class folders; expected <class>/<file>"),
    ],
)
def test_a_mistake_is_reported_and_nothing_is_written(
    photos_folder: Path, tmp_path: Path, overrides: dict[str, Any], message: str
):
    (tmp_path / "columns.csv").write_text("img_name,klass\n000000.jpg,A\n")
    (tmp_path / "one_class.csv").write_text("img_name,class,subset\n000000.jpg,A,train\n")
    (tmp_path / "others.csv").write_text("img_name,class,subset\nz.jpg,A,train\ny.jpg,B,train\n")
    formatted = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in overrides.items()}
    root = tmp_path / "root"
    with pytest.raises(UserError, match=message):
        ingest_photos(str(root), settings(photos_folder, **formatted))
    assert storage.list_files(str(root)) == []


def test_a_root_that_is_not_writable_is_reported(photos_folder: Path, tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"`root`: .*/file/root is a folder below "):
        ingest_photos(str(tmp_path / "file" / "root"), settings(photos_folder))


def test_a_class_that_has_no_photos_any_more_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ray_cluster: str
):
    folder, ingest_settings = tmp_path / "photos", IngestSettings(photos=str(tmp_path / "photos"))
    write_noise(folder, [f"{subset}/{label}/{n}" for subset in ("train", "test") for label in "abc" for n in "01"])
    ingest_photos(str(tmp_path), ingest_settings)
    for path in folder.glob("*/c"):
        shutil.rmtree(path)
    ingest_photos(str(tmp_path), ingest_settings, update=True)
    told = [record.message for record in caplog.records if "any more" in record.message]
    assert told == ["ingest: class c has no photos any more; dataset v1 is without it"]
