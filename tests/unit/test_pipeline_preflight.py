"""Preflight check of a pipeline: all problems at once, before any photo is read, and the plan."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from carclass.config import cli
from carclass.config.pipeline_sections import check_sections
from carclass.config.schema import Config, TrainSettings
from carclass.data import dataset, formats, photo
from carclass.data.dataset import SPLITS
from carclass.data.draft import Draft
from carclass.data.inventory import Inventory
from carclass.errors import UserError
from carclass.experiments import estimate, pipeline_preflight
from carclass.experiments.machine import Machine
from carclass.ingestion import ingest
from carclass.ingestion.inputs import list_inputs
from carclass.runs.run import Run, begin_run
from tests.helpers.photos import scene
from tests.helpers.runs import FROZEN, begin, finish, publish_dataset

JOBS = Path(__file__).parents[2] / "jobs"
SMALL = {"architecture": "resnet26-narrow", "image_size": 64}
TRAIN = {"name": "first", "parent": "sample", "model": SMALL, "unfrozen": {"epochs": 2, "warmup_epochs": 0}}
MASK = {"detector": {"model": "sample", "weights": "sample"}}
CPUS = Machine(2, 24_000_000_000)
CLUSTER = Machine(128, 0, node_cpus=16)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder per class with ten photos each."""
    data = photo.encode(scene(60, 100))
    for i in range(20):
        path = tmp_path / "photos" / ("audi", "bmw")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data + bytes([i]))
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a cluster unavailable: what needs one is not checked, and reported as another problem."""
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")


def config(tmp_path: Path, photos: Path, **sections: Any) -> Config:
    values = {"ingest": {"photos": str(photos)}, "mask": MASK, "train": TRAIN, **sections}
    return Config.model_validate({"root": str(tmp_path / "root"), **values})


def problems(settings: Config, *, update: bool = False) -> str:
    """Return the problems besides that of the cluster."""
    with Inventory() as inventory, pytest.raises(UserError) as error:
        pipeline_preflight.check_pipeline(settings, inventory, update=update)
    assert "RAY_ADDRESS is nowhere" in str(error.value)
    return str(error.value)


def test_a_pipeline_without_mistakes_has_only_the_problem_of_the_cluster(tmp_path: Path, photos: Path):
    assert problems(config(tmp_path, photos)).startswith("RAY_ADDRESS is nowhere")


def test_all_problems_are_listed_together_and_nothing_is_written(tmp_path: Path, photos: Path):
    train = {**TRAIN, "parent": "/nowhere/w.pth", "dataset": "v7"}
    text = problems(config(tmp_path, photos / "none", train=train, mask={**MASK, "truth": "/nowhere/t.json"}))
    assert text.startswith("5 problems, all found before the first step:\n  1. ")
    for part in (
        "`train.parent`: /nowhere/w.pth",
        "`train.dataset` is v7, which",
        "`ingest.photos`: no folder",
        "`mask.truth`: there",
    ):
        assert part in text
    assert not (tmp_path / "root" / "datasets").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mask": None}, r"`train.dataset` is v2, which no section makes .* to v1, or add the section `mask: \{\}`"),
        ({"mask": {**MASK, "source": "v7"}}, "`mask.source` is v7, which no section makes .* Set it to v1"),
        ({"train": {**TRAIN, "dataset": "v7"}}, "`train.dataset` is v7, which no section makes .* Set it to v2"),
        ({"train": {**TRAIN, "parent": "exp_9@best"}}, "no run `exp_9`"),
        ({"mask": {"detector": {"model": "sample", "weights": "/no.pth"}}}, "`mask.detector.weights`: /no.pth"),
    ],
)
def test_a_missing_dataset_run_or_file_is_found(tmp_path: Path, photos: Path, sections: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"(?s){message}"):
        raise UserError(problems(config(tmp_path, photos, **sections)))


@pytest.mark.parametrize(
    ("ingest_settings", "message"),
    [
        ({"test_fraction": 0}, "`evaluate.split` is test, but no photo is in test"),
        ({"val_fraction": 0}, "dataset `v2` has no val photos"),
        ({"num_classes": 3}, "`ingest.num_classes` is 3, but the labelled photos .* have 2 classes"),
    ],
)
def test_splits_and_classes_are_known_from_the_labels(
    tmp_path: Path, photos: Path, ingest_settings: dict[str, Any], message: str
):
    settings = config(tmp_path, photos, ingest={"photos": str(photos), **ingest_settings})
    with pytest.raises(UserError, match=f"(?s){message}"):
        raise UserError(problems(settings))


def publish(root: Path, name: str, **facts: Any) -> None:
    splits = dict.fromkeys(SPLITS, 0)
    counts = {"inputs": 0, "rows": 0, "quarantined": 0, "splits": splits, "reasons": {}}
    manifest = {"kind": "photos", "parts": {}, "quarantine": {}, "listing": "", "classes": [], **counts}
    formats.write(f"{dataset.dataset_uri(str(root), name)}/manifest.json", "manifest", {**manifest, **facts})


def test_names_that_other_settings_use_are_found(tmp_path: Path, photos: Path):
    settings = config(tmp_path, photos)
    assert settings.ingest is not None
    assert settings.train is not None
    other = ingest.identify_settings(settings.ingest.model_copy(update={"max_side": 100}))
    publish(tmp_path / "root", "v1", settings=other)
    publish(tmp_path / "root", "v2", settings={})
    run = settings.train.model_copy(update={"seed": 7}).model_dump(mode="json")
    formats.write(str(tmp_path / "root" / "experiments" / "first" / "config.yml"), "run_config", run)
    text = problems(settings)
    assert "dataset `v1` in" in text
    assert "made with other settings (max_side)" in text
    assert "dataset `v2` in" in text
    assert "run `first` in" in text
    assert "begun with other settings (seed)" in text


def test_an_unfinished_dataset_of_other_settings_is_found(tmp_path: Path, photos: Path):
    settings = config(tmp_path, photos)
    assert settings.ingest is not None
    begun = ingest.identify_settings(settings.ingest) | {"val_fraction": 0.4}
    with Inventory() as inventory:
        Draft(dataset.dataset_uri(settings.root, "v1"), begun, inventory).begin()
    assert "v1 is unfinished and was begun with other settings (val_fraction)" in problems(settings)


def publish_version(root: Path, settings: Config, inputs: int) -> dataset.Dataset:
    """Publish a dataset of the settings of ingestion with a number of inputs, and return it."""
    assert settings.ingest is not None
    counts = {"inputs": inputs, "rows": inputs, "splits": {"train": inputs - 2, "val": 1, "test": 1}}
    shares = {"test": 0.2, "val": 0.2}
    publish(root, "v1", settings=ingest.identify_settings(settings.ingest), held_out=shares, **counts)
    return dataset.load_dataset(str(root), "v1")


@pytest.mark.parametrize("update", [False, True])
def test_a_masked_dataset_of_an_earlier_version_is_found(tmp_path: Path, photos: Path, update: bool):
    settings, root = config(tmp_path, photos), tmp_path / "root"
    publish_version(root, settings, 20)
    publish(root, "v2", settings={}, source_digest="0" * 64)
    text = problems(settings, update=update)
    assert ("dataset `v2` in" in text and "published from other photos or labels. Add --update" in text) != update


@pytest.mark.parametrize("update", [False, True])
def test_a_dataset_of_more_photos_than_today_is_found_before_the_plan(tmp_path: Path, photos: Path, update: bool):
    settings = config(tmp_path, photos)
    publish_version(tmp_path / "root", settings, 19)
    text = problems(settings, update=update)
    assert ("dataset `v1` in" in text and "or labels (jobs/ingest.py tells which). Add --update" in text) != update


def test_a_run_on_an_earlier_version_of_its_dataset_is_found(tmp_path: Path, photos: Path):
    settings, root = config(tmp_path, photos, train={**TRAIN, "dataset": "v1"}, mask=None), tmp_path / "root"
    begin_run(Run(str(root), settings.train), publish_version(root, settings, 19), "0" * 64)  # type: ignore[arg-type]
    assert "was begun on an earlier version of dataset `v1`" in problems(settings, update=True)
    assert "--train.name first-2" in problems(settings, update=True)


def test_a_run_on_a_masked_dataset_whose_source_has_changed_is_found_before_masking(tmp_path: Path, photos: Path):
    settings, root = config(tmp_path, photos), tmp_path / "root"
    publish_version(root, settings, 20)
    publish(root, "v2", settings={}, source_digest="0" * 64)
    begin_run(Run(str(root), settings.train), dataset.load_dataset(str(root), "v2"), "0" * 64)  # type: ignore[arg-type]
    with Inventory() as inventory:
        listed = list_inputs(settings.root, settings.ingest, inventory)  # type: ignore[arg-type]
        outdated = pipeline_preflight.find_outdated(settings, listed)
    with pytest.raises(UserError, match=r"run `first` in .* was begun on an earlier version of dataset `v2`"):
        pipeline_preflight.check_run_photos(settings, outdated)


def test_the_plan_names_what_is_published_anew(tmp_path: Path, photos: Path):
    settings, root = config(tmp_path, photos), tmp_path / "root"
    with Inventory() as inventory:
        listed = list_inputs(settings.root, settings.ingest, inventory)  # type: ignore[arg-type]
        publish_version(root, settings, 19)
        outdated = pipeline_preflight.find_outdated(settings, listed)
        planned = pipeline_preflight.plan_datasets(settings, listed)
        rows = dict(pipeline_preflight.describe_plan(settings, listed, planned, CPUS, outdated))
    assert rows["published anew"] == "v1: only new photos are processed"
    assert "published" not in rows


def test_contradicting_sections_are_listed_together(tmp_path: Path, photos: Path):
    sections = {
        "compare_unmasked": True,
        "evaluate": {"stage": "frozen"},
        "mask": {**MASK, "dataset": "v1"},
        "train": {**TRAIN, "frozen": None, "dataset": "v1"},
    }
    with pytest.raises(UserError, match=r"(?s)3 problems.*`train.frozen` is null.*`compare_unmasked`.*`mask.dataset`"):
        check_sections(config(tmp_path, photos, **sections))


def test_a_full_disk_is_known_before_the_first_photo(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    settings = config(tmp_path, photos)
    with Inventory() as inventory:
        listed = list_inputs(settings.root, settings.ingest, inventory)  # type: ignore[arg-type]
        (tmp_path / "root").mkdir()
        pipeline_preflight.check_disk(settings, listed)
        inventory.execute("UPDATE input SET size = 1000000000000")
        monkeypatch.setattr(pipeline_preflight, "SMALL_PHOTO_BYTES", 10**15)
        with pytest.raises(UserError, match=r"`root`: .* need at least 40000.0 GB. Free some"):
            pipeline_preflight.check_disk(settings, listed)


def test_a_root_that_cannot_be_written_to_is_one_problem(tmp_path: Path, photos: Path):
    text = problems(config(tmp_path, photos).model_copy(update={"root": "/proc/1/x"}))
    assert "`root`: /proc/1/x cannot be written to" in text
    assert "free, and the dataset" not in text


def test_a_failed_preflight_leaves_no_folder(tmp_path: Path, photos: Path):
    settings = config(tmp_path, photos)
    problems(settings)
    assert not Path(settings.root).exists()


def test_the_plan_has_the_steps_that_are_left_with_their_photos(tmp_path: Path, photos: Path):
    settings = config(tmp_path, photos)
    with Inventory() as inventory:
        listed = list_inputs(settings.root, settings.ingest, inventory)  # type: ignore[arg-type]
        planned = pipeline_preflight.plan_datasets(settings, listed)
        rows = dict(pipeline_preflight.describe_plan(settings, listed, planned, CPUS))
        publish(tmp_path / "root", "v1", settings={})
        later = dict(pipeline_preflight.describe_plan(settings, listed, planned, CPUS))
    assert rows["photos"] == "12 train, 4 val, 4 test"
    assert [*rows] == ["photos", "ingest", "mask", "train, frozen", "train, unfrozen", "evaluate", "total", "assumed"]
    assert rows["mask"].startswith("20 photos on 2 CPU(s): about ")
    assert rows["assumed"].startswith("all photos are usable; 2 CPUs, 24 GB of memory, no GPU; ")
    assert later["published"] == "v1"
    assert "ingest" not in later


def test_large_photos_take_longer_to_ingest_in_the_plan(tmp_path: Path, photos: Path):
    settings = config(tmp_path, photos)
    with Inventory() as inventory:
        listed = list_inputs(settings.root, settings.ingest, inventory)  # type: ignore[arg-type]
        planned = pipeline_preflight.plan_datasets(settings, listed)
        inventory.execute("UPDATE input SET size = 300000000")
        rows = dict(pipeline_preflight.describe_plan(settings, listed, planned, CPUS))
    assert rows["ingest"].startswith("20 photos: about 75 s, ")  # 15 s, and 6 s of two cores for each


@pytest.mark.parametrize(("num_workers", "nodes"), [(1, 1), (2, 2), ([1, 4], 4), (9, 8)])
def test_a_training_worker_is_planned_on_one_node_of_a_cluster(
    tmp_path: Path, photos: Path, num_workers: Any, nodes: int
):
    settings = config(tmp_path, photos, train={**TRAIN, "num_workers": num_workers})
    many = estimate.Photos(dict.fromkeys(SPLITS, 10**6))
    cluster = {step.name: step.seconds for step in estimate.plan_steps(settings, many, CLUSTER)}
    node = {step.name: step.seconds for step in estimate.plan_steps(settings, many, Machine(nodes * 16, 0))}
    whole = {step.name: step.seconds for step in estimate.plan_steps(settings, many, Machine(128, 0))}
    assert cluster == whole | {name: node[name] for name in ("train, frozen", "train, unfrozen")}


def test_the_plan_of_a_finished_run_is_to_evaluate_it_again(tmp_path: Path, photos: Path):
    settings = config(tmp_path, photos, compare_unmasked=True)
    for name in ("v1", "v2"):
        publish(tmp_path / "root", name, settings={})
    for stage in ("frozen", "unfrozen"):
        finish(Run(settings.root, settings.train), epochs=2, kept=(2,), stage=stage)  # type: ignore[arg-type]
    with Inventory() as inventory:
        listed = list_inputs(settings.root, settings.ingest, inventory)  # type: ignore[arg-type]
        planned = pipeline_preflight.plan_datasets(settings, listed)
        rows = dict(pipeline_preflight.describe_plan(settings, listed, planned, CPUS))
    assert (rows["published"], rows["trained"]) == ("v1, v2", "first")
    steps = ["evaluate", "train, frozen, unmasked", "train, unfrozen, unmasked", "evaluate, unmasked"]
    assert [*rows][3:-2] == steps
    assert rows["evaluate"].startswith("4 test photos: about ")


def test_a_limit_of_masks_leaves_the_masked_dataset_unplanned(tmp_path: Path, photos: Path):
    """Masking chooses photos by content, so the splits of a limited one are unknown."""
    settings = config(tmp_path, photos, mask={**MASK, "limit": 4})
    with Inventory() as inventory:
        listed = list_inputs(settings.root, settings.ingest, inventory)  # type: ignore[arg-type]
        assert [*pipeline_preflight.plan_datasets(settings, listed)] == ["v1"]


@pytest.mark.parametrize(
    ("classes", "parent", "message"),
    [
        (["audi", "bmw"], "other@3", "the weights of other@3 were not kept"),
        (["audi", "fiat"], "other@2", "other@2 and the dataset `v2` have different classes, such as fiat"),
    ],
)
def test_a_parent_that_does_not_fit_is_found(
    tmp_path: Path, photos: Path, classes: list[str], parent: str, message: str
):
    root = tmp_path / "root"
    publish_dataset(root, "old", classes)
    finish(begin(root, TrainSettings(name="other", dataset="old", **FROZEN)), classes=classes)
    assert message in problems(config(tmp_path, photos, train={**TRAIN, "parent": parent}))


def test_a_file_written_by_init_passes(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch):
    """With the sample's weights in place of those that are downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["init.py", "photos"])
    runpy.run_path(str(JOBS / "init.py"))["main"]()
    flags = {
        "mask.detector.model": "sample",
        "mask.detector.weights": "sample",
        "train.parent": "sample",
        "train.model.architecture": "resnet26-narrow",
    }
    arguments = [text for key, value in flags.items() for text in (f"--{key}", value)]
    settings = cli.parse_job("", None, ["--config", "my.yml", *arguments])
    check_sections(settings)
    assert problems(settings).startswith("RAY_ADDRESS is nowhere")


def test_a_root_that_cannot_be_written_to_is_one_of_the_problems(tmp_path: Path, photos: Path):
    text = problems(config(tmp_path, photos, root="/proc/none", train={**TRAIN, "dataset": "v7"}))
    assert "`root`: " in text
    assert "`train.dataset` is v7" in text
