"""First config file of own photos: it holds what ingestion will find, and settings that fit data and machine."""

import json
import logging
import os
import resource
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from carclass.config import cli
from carclass.config.schema import Config, UnfrozenSettings
from carclass.data import photo
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.experiments import estimate, first_config, machine
from carclass.experiments.machine import Machine
from carclass.ingestion.inputs import list_inputs
from carclass.ingestion.split import count_held_out
from carclass.ingestion.survey import PhotoSample, Survey, make_settings
from carclass.models.resnet import ARCHITECTURES
from tests.helpers.held_out import Photo, publish
from tests.helpers.photos import scene

REPO = Path(__file__).parents[2]
JPEG = photo.encode(scene(60, 100))
CPUS, GPUS = Machine(2, 24_000_000_000), Machine(16, 128_000_000_000, (80_000_000_000, 80_000_000_000))
Files = dict[str, bytes]


def write(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def classes(prefix: str = "", number: int = 10) -> Files:
    """Return two classes of different photos."""
    names = [f"{prefix}{name}/{name}{i}.jpg" for name in ("audi", "bmw") for i in range(number)]
    return {name: JPEG + name.encode() for name in names}


def flat(*names: str) -> Files:
    return {name: JPEG + name.encode() for name in names}


TABLE = b"id;model;split\n" + b"".join(
    b"%03d;%s;%s\n" % (i, [b"audi", b"bmw"][i % 2], [b"train", b"dev"][i < 4]) for i in range(20)
)
NUMBERED = {"t.csv": TABLE} | flat(*(f"p/{i:03d}.jpg" for i in range(20)))


def init(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str | Path) -> Config:
    """Run jobs/init.py in the output's folder, and return the settings in the file that it wrote."""
    monkeypatch.chdir(output.parent)
    monkeypatch.setattr(sys, "argv", ["init.py", *map(str, arguments), "--output", output.name])
    runpy.run_path(str(REPO / "jobs" / "init.py"))["main"]()
    return cli.parse_job("", None, ["--config", str(output)])


def test_results_go_elsewhere_if_their_folder_has_a_dataset_of_other_photos(tmp_path: Path):
    results, ingest = tmp_path / "results", make_settings(str(write(tmp_path / "p", classes())), None)
    folder, roots = results / "datasets" / ingest.dataset, []
    publish(folder, [Photo(f"{label}{i}", label, "train") for label in ("audi", "bmw") for i in range(10)])
    values = json.loads((folder / "manifest.json").read_text())
    for photos in (ingest.photos, "/others"):
        write(folder, {"manifest.json": json.dumps({**values, "settings": {"photos": photos}}).encode()})
        roots.append(first_config.choose_root(results, ingest))
    assert roots == [str(results), f"{results}-2"]


def zipped(folder: Path) -> Path:
    return Path(shutil.make_archive(str(folder), "zip", folder))


@pytest.mark.parametrize(
    ("files", "arguments", "layout", "splits"),
    [
        pytest.param(classes(), ["p"], "one folder per class", (12, 4, 4), id="folders of classes"),
        pytest.param(
            {**classes("Train/"), **classes("valid/", 2), **classes("test/", 3)},
            ["p"], "folders of subsets, with one folder per class in each", (20, 4, 6), id="train, val and test",
        ),
        pytest.param({**classes("train/"), **classes("test/", 3)}, ["p"], "folders of subsets", (16, 4, 6), id="test"),
        pytest.param(classes("cars/photos/"), ["p"], "one folder per class, below cars/photos", (12, 4, 4), id="below"),
        pytest.param(
            NUMBERED, ["p/p", "--labels", "p/t.csv"], "photos, labels in a table", (12, 4, 4),
            id="a table of ids with other columns",
        ),
        pytest.param(NUMBERED, ["p"], "photos, labels in a table", (12, 4, 4), id="a table among them"),
        pytest.param(
            NUMBERED, ["p/p"], "photos, labels in a table", (12, 4, 4), id="a table beside them"
        ),
        pytest.param(classes("top/"), ["p.zip"], "one folder per class, below top, in an archive", (12, 4, 4), id="z"),
    ],
)  # fmt: skip
def test_a_layout_is_recognised_and_counted_as_ingestion_counts(
    files: Files, arguments: list[str], layout: str, splits: tuple[int, int, int], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    zipped(write(tmp_path / "p", files))
    settings = init(monkeypatch, tmp_path / "my.yml", *arguments)
    printed = capsys.readouterr().out
    assert f"  {layout}" in printed
    assert settings.ingest is not None
    with Inventory() as inventory:
        shares = list_inputs(settings.root, settings.ingest, inventory).shares
        number = inventory.scalar("SELECT count(*) FROM input WHERE label NOT NULL")
        found: Counter[str] = Counter()
        for subset, count in inventory.query(
            "SELECT subset, count(*) FROM input WHERE label NOT NULL GROUP BY subset, label"
        ):
            found.update(count_held_out(count, shares) if subset == "train" else {subset: count})
    assert (found["train"], found["val"], found["test"]) == splits
    assert f"{number:,} of 2 classes" in printed
    assert f"train {found['train']}, val {found['val']}" in printed


def test_splits_are_counted_as_they_are_held_out(tmp_path: Path):
    sizes = (1, 2, 3, 7, 25, 40, 101)
    photos = [Photo(f"{size}/{i}", str(size)) for size in sizes for i in range(size)]
    rows = publish(tmp_path, photos, {"test": 0.3, "val": 0.15}).read(["label", "split"]).to_pylist()
    for size in sizes:
        found = Counter(row["split"] for row in rows if row["label"] == str(size))
        assert +Counter(count_held_out(size, {"test": 0.3, "val": 0.15})) == found


def test_odd_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "p", {**classes(), "audi/notes.txt": b"", "left.jpg": JPEG, "bmw/broken.jpg": JPEG[:50]})
    init(monkeypatch, tmp_path / "my.yml", "p")
    printed, written = capsys.readouterr().out, (tmp_path / "my.yml").read_text()
    for text in ("'audi/notes.txt'", "'left.jpg'", "'bmw/broken.jpg'"):
        assert text in printed
        assert text in written


def test_unusable_photos_of_the_sample_are_counted_by_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    broken = {f"audi/broken{i}.jpg": JPEG[:50] + bytes([i]) for i in range(3)}
    write(tmp_path / "p", {**classes(), **broken, "bmw/empty.jpg": b""})
    init(monkeypatch, tmp_path / "my.yml", "p")
    printed, written = capsys.readouterr().out, (tmp_path / "my.yml").read_text()
    for text in ("unusable, truncated: 3 of 24 photos sampled", "unusable, empty: 1 of 24 photos sampled"):
        assert text in written
        assert " ".join(text.split(": ")) in " ".join(printed.split())
    assert "4 of 24 photos sampled are unusable: of all 24, about 4 will be quarantined" in printed


def test_the_table_of_labels_among_the_photos_is_no_odd_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    write(tmp_path / "p", NUMBERED)
    with caplog.at_level(logging.INFO):
        init(monkeypatch, tmp_path / "my.yml", "p")
    printed = capsys.readouterr().out
    assert f"labels            {tmp_path}/p/t.csv" in printed
    assert "set aside" not in printed
    assert "no photos by their names" not in caplog.text
    write(tmp_path / "p", {"notes.txt": b""})
    init(monkeypatch, tmp_path / "my.yml", "p", "--overwrite")
    assert "set aside, junk   1, such as 'notes.txt'" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["p"], ["p/p", "--labels", "p/t.csv"]])
def test_columns_of_any_names_may_be_given(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "p", {**NUMBERED, "t.csv": TABLE.replace(b"id;model;split", b"nr;maker;split")})
    settings = init(monkeypatch, tmp_path / "my.yml", *arguments, "--columns", "{name: nr, class: maker}")
    assert settings.ingest is not None
    assert settings.ingest.columns == {"name": "nr", "class": "maker", "subset": "split"}


def test_the_terminal_gets_no_control_characters_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path / "p\x1b[2J", {**classes(), "x\x1b[2J.txt": b""})
    init(monkeypatch, tmp_path / "my.yml", "p\x1b[2J")
    assert "\x1b" not in capsys.readouterr().out


def test_recognised_columns_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path / "p", NUMBERED)
    settings = init(monkeypatch, tmp_path / "my.yml", "p")
    assert settings.ingest is not None
    assert settings.ingest.columns == {"name": "id", "class": "model", "subset": "split"}
    assert "name: id, class: model, subset: split" in capsys.readouterr().out


def test_the_file_names_the_next_command_and_what_each_step_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "p", classes())
    init(monkeypatch, tmp_path / "my.yml", "p")
    written = (tmp_path / "my.yml").read_text()
    assert written.startswith("# Next: python jobs/pipeline.py --config my.yml\n")
    assert "# train, unfrozen: 30 epochs of 12 photos at 64 px: about " in written


@pytest.mark.parametrize("name", ["${HOME} #1: 'a' \"b\" - é", "sample", "a" * 90 + " b" * 40, "x\ny"])
def test_a_folder_of_any_name_is_found_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / name, classes())
    settings = init(monkeypatch, tmp_path / "my.yml", name)
    assert settings.ingest is not None
    assert settings.ingest.photos == str(tmp_path / name)


def test_a_class_of_any_name_stays_within_the_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(
        tmp_path / "p", {f"{name}/{i}.jpg": JPEG for i in range(3) for name in ("a\u2028mask: 1", "b\x85c", "x", "# y")}
    )
    assert init(monkeypatch, tmp_path / "my.yml", "p").mask is not None


def test_an_existing_file_is_replaced_only_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "p", classes())
    (tmp_path / "my.yml").write_text("mine")
    with pytest.raises(UserError, match=r"`--output`: my\.yml exists\. Choose another name, or add --overwrite"):
        init(monkeypatch, tmp_path / "my.yml", "p")
    assert (tmp_path / "my.yml").read_text() == "mine"
    init(monkeypatch, tmp_path / "my.yml", "p", "--overwrite")
    assert (tmp_path / "my.yml").read_text().startswith("# Next: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([".", "--output", "my.yml"], "my.yml would lie among the photos"),
        (["p", "--output", "none/my.yml"], "there is no folder .*/none"),
        (["p", "--output", "q"], "q is a folder"),
        (["p", "--output", "q", "--overwrite"], "q is a folder"),
        (["nowhere"], "no folder .*/nowhere; check the path"),
        (["pp"], "no folder .*/pp; did you mean `p`"),
        (["e/photo.zip"], "no archive .*/photo.zip; did you mean `photos.zip`"),
        (["e/empty"], "no files in .*/empty. Check the path"),
        (["q"], r"only one class \(audi\)"),
        (["flat"], "several tables are in or beside .*flat: .*a.csv, .*b.csv. Name the one"),
        (["p", "--labels", "p"], "/p cannot be read .a folder without a devkit"),
        (["p", "--labels", "none.csv"], "`ingest.labels`: .*none.csv cannot be read"),
        (["flat/a.csv"], "a.csv is a file. Set it to a folder"),
        (["p/audi/audi0.jpg"], "audi0.jpg is a file. Set it to a folder"),
        (["huge"], "photos have only one class"),
        (["s3:bucket/x"], "an S3 URI is written"),
        (["p", "--columns", "{name: nr}"], "`--columns` has no effect: no table of labels is in or beside p"),
        (["flat", "--labels", "flat/a.csv", "--columns", "{key: nr}"], "^`--columns`: `key`"),
        (["flat", "--labels", "flat/a.csv", "--columns", "nr"], "^`--columns`: must"),
    ],
)
def test_a_mistake_is_reported_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write(tmp_path / "p", classes())
    write(tmp_path / "q", flat("audi/1.jpg"))
    write(tmp_path / "flat", {**flat("1.jpg"), "a.csv": b"", "b.csv": b""})
    write(tmp_path / "e", {"a.csv": b"", "b.csv": b"", "photos.zip": b""})
    (tmp_path / "e" / "empty").mkdir()
    write(tmp_path / "huge", {"a/1.jpg": JPEG, "b/2.jpg": b""})
    os.truncate(tmp_path / "huge" / "b" / "2.jpg", 600 * 2**20)  # takes no space
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["init.py", *arguments])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        runpy.run_path(str(REPO / "jobs" / "init.py"))["main"]()
    assert sorted(tmp_path.rglob("*")) == before


# Settings that fit


def survey(photos_per_class: int, side: int = 480) -> Survey:
    subsets = {name: {"train": photos_per_class} for name in "abcd"}
    sample = PhotoSample([(side, 700)] * 9, 60_000, {}, 0.003)
    return Survey(make_settings("/photos", None), "", subsets, {"test": 0.2, "val": 0.2}, {}, sample)


def test_the_next_step_is_to_add_photos_where_they_are_too_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write(tmp_path / "p", classes(number=2))
    init(monkeypatch, tmp_path / "my.yml", "p")
    first = "Next: add photos: none is in val and test, and a class needs at least 4 to be in all splits; then python "
    assert first in capsys.readouterr().out
    assert first in (tmp_path / "my.yml").read_text().replace("\n# ", " ")


def test_a_gpu_trains_both_stages_at_full_size_with_a_worker_each():
    train = first_config.choose_settings("/r", survey(1000), GPUS).train
    assert train is not None
    assert (train.model.image_size, train.num_workers) == (224, 2)
    assert train.unfrozen is not None


@pytest.mark.parametrize(("photos", "epochs"), [(50, 30), (15_000, 15), (100_000, None)])
def test_on_cpus_the_unfrozen_stage_is_as_long_as_time_allows(photos: int, epochs: int | None):
    train = first_config.choose_settings("/r", survey(photos), CPUS).train
    assert train is not None
    assert (train.unfrozen and train.unfrozen.epochs) == epochs
    assert train.model.image_size == (128 if epochs else 224)


def test_small_photos_are_not_enlarged():
    train = first_config.choose_settings("/r", survey(50, side=100), GPUS).train
    assert train is not None
    assert train.model.image_size == 96


def test_a_batch_that_exceeds_the_memory_is_divided():
    train = first_config.choose_settings("/r", survey(500), Machine(4, 16 * 10**9, (3_000_000_000,))).train
    assert train is not None
    assert train.unfrozen is not None
    assert train.unfrozen.micro_batch_size == 8


@pytest.mark.parametrize(("photos", "frozen", "unfrozen"), [(10, 16, 8), (100, 32, 32), (2000, 128, 32)])
def test_few_photos_are_trained_in_small_batches(photos: int, frozen: int, unfrozen: int):
    train = first_config.choose_settings("/r", survey(photos), GPUS).train
    assert train is not None
    assert train.frozen is not None
    assert train.unfrozen is not None
    assert (train.frozen.batch_size, train.unfrozen.batch_size) == (frozen, unfrozen)
    assert train.unfrozen.lr / unfrozen == UnfrozenSettings().lr / 32


@pytest.mark.parametrize("used", [CPUS, GPUS])
@pytest.mark.parametrize("photos", [10, 100_000])
def test_chosen_settings_pass_the_checks_of_a_config_file(photos: int, used: Machine, tmp_path: Path):
    settings = first_config.choose_settings(str(tmp_path), survey(photos), used)
    (tmp_path / "my.yml").write_text(first_config.render_config(settings, ["Next: x"]))
    assert cli.parse_job("", None, ["--config", str(tmp_path / "my.yml")]) == settings


def test_twice_the_photos_take_twice_the_time_beyond_the_start():
    def seconds(number: int) -> list[float]:
        steps = estimate.plan_steps(
            settings, estimate.Photos({"train": 6 * number, "val": number, "test": number}), CPUS
        )
        return [step.seconds - estimate.START_SECONDS for step in steps]

    settings = first_config.choose_settings("/r", survey(50), CPUS)
    assert seconds(2000) == pytest.approx([2 * each for each in seconds(1000)])


@pytest.mark.parametrize(("visible", "expected"), [(None, 2), ("", 0), ("1", 1), ("0,1", 2)])
def test_gpus_are_those_that_cuda_sees(
    visible: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 81559\necho 24564\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(machine.this_machine().gpus) == expected


def test_a_driver_that_fails_counts_as_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.this_machine().gpus == ()


@pytest.mark.slow  # 8 s: twenty thousand files
def test_twenty_thousand_files_take_less_than_ten_seconds_of_a_core(tmp_path: Path):
    (tmp_path / "one.jpg").write_bytes(JPEG)
    for i in range(20_000):
        folder = tmp_path / "p" / f"class {i % 100}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / "one.jpg", folder / f"{i}.jpg")
    before = cpu_seconds()
    subprocess.run([sys.executable, REPO / "jobs" / "init.py", "p"], cwd=tmp_path, check=True, capture_output=True)
    assert cpu_seconds() - before < 10


def cpu_seconds() -> float:
    """Return the CPU time of child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_every_architecture_has_its_arithmetic():
    assert set(estimate.RELATIVE_COST) == set(estimate.RUN_BYTES) == set(ARCHITECTURES)
