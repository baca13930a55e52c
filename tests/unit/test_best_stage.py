"""The model of a run: the best epoch over its stages, in every job that uses it."""

import logging
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load

from carclass import load_run, storage
from carclass.config.schema import TrainSettings
from carclass.data import dataset, formats
from carclass.errors import UserError
from carclass.experiments import status, tree_view
from carclass.experiments.collect import read_test
from carclass.experiments.status import RunStatus
from carclass.experiments.tree import Budget, Experiment, Tree
from carclass.models import architectures
from carclass.runs.run import Run, find_run, record_best_stage
from carclass.training import pretrained
from carclass.training.train import (
    describe_stages,
    is_chance,
    load_run_inputs,
    log_resumed,
    train_run,
    warn_if_unfreezing_hurt,
)
from tests.helpers.runs import CLASSES, MODEL, begin, finish, publish_dataset

BOTH = {"model": MODEL, "parent": "sample", "frozen": {"epochs": 5}, "unfrozen": {"epochs": 2}}
SETTINGS = TrainSettings(name="both", **BOTH)
BIAS = {"frozen": 5, "unfrozen": 2}
"""Bias of the classifier of each stage's best model."""


def make_run(root: Path, frozen: int, unfrozen: int) -> Run:
    """Finish a run of both stages, after 5 and 2 epochs, with these val accuracies in percent."""
    publish_dataset(root)
    run = begin(root, SETTINGS)
    finish(run, stage="frozen", epochs=5, scale=500 // frozen)
    finish(run, stage="unfrozen", epochs=2, scale=200 // unfrozen)
    return run


@pytest.fixture
def worse(tmp_path: Path) -> Run:
    """Return a run that is worse after unfreezing: val accuracies 0.5 and 0.25."""
    return make_run(tmp_path, frozen=50, unfrozen=25)


def bias_of(uri: str) -> float:
    return float(load(storage.read_bytes(f"{uri}.safetensors"))["fc.1.bias"][0])


# Choice


@pytest.mark.parametrize(
    ("frozen", "unfrozen", "stage"), [(50, 25, "frozen"), (25, 50, "unfrozen"), (50, 50, "frozen")]
)
def test_the_stage_with_the_best_epoch_is_chosen_and_the_first_of_equals(
    tmp_path: Path, frozen: int, unfrozen: int, stage: str
):
    assert make_run(tmp_path, frozen, unfrozen).best_stage == stage


def test_the_choice_is_recorded(worse: Run):
    record_best_stage(worse)
    facts = formats.read(f"{worse.uri}/model.json", "run_model")
    sha256 = formats.read(f"{worse.model_uri('frozen')}.json", "model")["sha256"]
    assert facts == {"format": 1, "stage": "frozen", "epoch": 5, "val_accuracy": 0.5, "sha256": sha256}


def test_a_recorded_choice_is_kept(worse: Run):
    record_best_stage(worse)
    recorded = formats.read(f"{worse.uri}/model.json", "run_model")
    sha256 = worse.model_facts("unfrozen")["sha256"]
    formats.write(f"{worse.uri}/model.json", "run_model", {**recorded, "stage": "unfrozen", "sha256": sha256})
    assert worse.best_stage == "unfrozen"


def test_a_stage_can_be_named(worse: Run):
    assert [worse.select_stage(stage) for stage in (None, "frozen", "unfrozen")] == ["frozen", "frozen", "unfrozen"]


def test_the_chosen_stage_is_logged(worse: Run, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "carclass"):
        worse.select_stage(None)
    assert caplog.messages == ["run both: its model is of the frozen stage, the best on val"]


def test_a_stage_that_the_run_lacks_is_an_error(tmp_path: Path):
    publish_dataset(tmp_path)
    run = begin(tmp_path, TrainSettings(name="head", **{**BOTH, "unfrozen": None}))
    finish(run)
    with pytest.raises(UserError, match=r"`stage`: run `head` in .* has no stage `unfrozen`, only frozen\. Name"):
        run.select_stage("unfrozen")


def test_a_run_has_no_model_before_its_last_stage_is_finished(tmp_path: Path):
    publish_dataset(tmp_path)
    run = begin(tmp_path, SETTINGS)
    finish(run, stage="frozen")
    with pytest.raises(UserError, match=r"unfrozen/best.safetensors: the run has not finished this stage"):
        run.select_stage(None)
    assert run.select_stage("frozen") == "frozen"


@pytest.mark.parametrize(
    ("frozen", "unfrozen", "photos", "text"),
    [
        (25, 50, 200, "0.500 (+0.250, beyond chance)"),
        (50, 25, 200, "0.250 (-0.250, beyond chance)"),
        (50, 25, 20, "0.250 (-0.250, within chance)"),
    ],
)
def test_the_gain_of_unfreezing_is_described(tmp_path: Path, frozen: int, unfrozen: int, photos: int, text: str):
    run = make_run(tmp_path, frozen, unfrozen)
    publish_dataset(tmp_path, splits={"val": photos})
    accuracy = f"{run.best_val_accuracy('frozen'):.3f}"
    assert describe_stages(run) == {"frozen val accuracy": accuracy, "unfrozen val accuracy": text}


def test_results_of_another_stage_have_its_name(worse: Run):
    assert [worse.stage_suffix(stage) for stage in ("frozen", "unfrozen")] == ["", "-unfrozen"]


# Use


@pytest.mark.parametrize(("stage", "bias"), [(None, 5), ("frozen", 5), ("unfrozen", 2)])
def test_load_run_loads_the_model_of_the_run_or_of_a_named_stage(worse: Run, stage: str | None, bias: int):
    assert load_run(worse.uri, stage=stage).model.get_parameter("net.fc.1.bias")[0] == bias


@pytest.mark.parametrize(("parent", "bias"), [("both@best", 5), ("both@2", 2), ("both@last", 2)])
def test_a_child_starts_from_the_model_of_the_run_or_from_epochs_of_its_last_stage(worse: Run, parent: str, bias: int):
    settings = TrainSettings(name="child", parent=parent, model=MODEL, frozen=None)
    net = architectures.build(settings.model, len(CLASSES))
    pretrained.load_pretrained(net, worse.root, settings, CLASSES)
    assert net.get_parameter("fc.1.bias")[0] == bias


def test_the_recorded_parent_of_a_child_is_the_model_of_the_run(worse: Run):
    facts = formats.read(f"{worse.model_uri('frozen')}.json", "model")
    assert status.parent_sha256(worse.root, "both@best") == facts["sha256"]


def test_the_tree_shows_the_model_of_the_run(worse: Run):
    lineage = formats.read(f"{worse.uri}/lineage.json", "lineage")
    assert lineage["dataset_digest"] == dataset.load_dataset(worse.root, "v2").digest
    tree = Tree(Budget(root=worse.root, experiments="exp_*.yml"), [Experiment("both.yml", SETTINGS)])
    assert "finished  val 0.500 (frozen epoch 5)" in tree_view.draw_tree(tree)


def test_the_status_of_an_unfinished_run_has_no_model(tmp_path: Path):
    publish_dataset(tmp_path)
    run = begin(tmp_path, SETTINGS)
    finish(run, stage="frozen")
    assert status.find_model(run) is None


# Reports


def write_report(run: Run, folder: str, **facts: str) -> None:
    """Write a report on one photo."""
    formats.write(f"{run.uri}/{folder}/metrics.json", "evaluation", {"accuracy": 1.0, "num_photos": 1, **facts})
    pq.write_table(
        pa.table({"key": ["a"], "label": ["x"], "predicted": ["x"]}), f"{run.uri}/{folder}/predictions.parquet"
    )


@pytest.mark.parametrize(("frozen", "unfrozen", "is_known"), [(50, 25, False), (25, 50, True)])
def test_a_report_from_before_the_choice_is_of_the_last_stage(
    tmp_path: Path, frozen: int, unfrozen: int, is_known: bool
):
    run = make_run(tmp_path, frozen, unfrozen)
    write_report(run, "report")
    path = Path(run.uri, "report", "metrics.json")
    path.write_text('{"accuracy": 1.0, "num_photos": 1}')
    assert (read_test(RunStatus(run, "finished", best=status.find_model(run))) is not None) == is_known
    assert (load_run(run.uri).predictions is not None) == is_known


def test_a_report_of_a_named_stage_is_not_that_of_the_run(worse: Run):
    write_report(worse, "report-v2-test-unfrozen", model_sha256=worse.model_facts("unfrozen")["sha256"])
    assert read_test(RunStatus(worse, "finished", best=status.find_model(worse))) is None
    assert load_run(worse.uri).predictions is None
    assert load_run(worse.uri, stage="unfrozen").predictions is not None


def test_a_report_of_the_model_of_the_run_is_read(worse: Run):
    write_report(worse, "report", model_sha256=worse.model_facts("frozen")["sha256"])
    assert read_test(RunStatus(worse, "finished", best=status.find_model(worse))) is not None
    assert load_run(worse.uri).predictions is not None


# Resuming


def test_a_resumed_run_says_which_epochs_are_done(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    publish_dataset(tmp_path)
    run = begin(tmp_path, SETTINGS)
    with caplog.at_level(logging.INFO, "carclass"):
        log_resumed(run)
        finish(run, stage="frozen")
        log_resumed(run)
    assert caplog.messages == ["train: run both is resumed, 5 of 5 frozen epochs and 0 of 2 unfrozen epochs are done"]


def test_epochs_without_a_checkpoint_are_not_done(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    publish_dataset(tmp_path)
    run = begin(tmp_path, SETTINGS)
    finish(run, stage="frozen")
    shutil.rmtree(Path(run.uri) / "frozen")
    with caplog.at_level(logging.INFO, "carclass"):
        log_resumed(run)
    assert caplog.messages == ["train: run both begins again, as it was interrupted before its first checkpoint"]


# Warning


def log_unfreezing(run: Run, num_val: int, caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return level and text of the lines on a run with this number of val photos."""
    source = dataset.load_dataset(run.root, "v2")
    source.manifest["splits"]["val"] = num_val
    with caplog.at_level(logging.INFO, "carclass"):
        warn_if_unfreezing_hurt(run, source)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


def test_a_run_that_is_worse_after_unfreezing_is_warned_about(worse: Run, caplog: pytest.LogCaptureFixture):
    ((level, text),) = log_unfreezing(worse, 100, caplog)
    assert level == "WARNING"
    assert "unfreezing made run both worse: val accuracy 0.250 (unfrozen) after 0.500 (frozen)" in text
    assert "lower `train.unfrozen.lr` (now 0.0006)" in text


def test_a_difference_on_few_val_photos_is_within_chance(worse: Run, caplog: pytest.LogCaptureFixture):
    ((level, text),) = log_unfreezing(worse, 20, caplog)
    assert level == "INFO"
    assert text.startswith("train: run both has val accuracy 0.250 unfrozen and 0.500 frozen: within chance for 20 val")


@pytest.mark.parametrize("unfrozen", [50, 100])
def test_a_run_that_is_no_worse_after_unfreezing_is_not_warned_about(
    tmp_path: Path, unfrozen: int, caplog: pytest.LogCaptureFixture
):
    assert log_unfreezing(make_run(tmp_path, 50, unfrozen), 100, caplog) == []


@pytest.mark.parametrize(
    ("correct", "num_photos", "expected"),
    [((16, 15), 20, True), ((18, 12), 20, False), ((800, 750), 1000, False), ((800, 780), 1000, True)],
)
def test_chance_is_two_standard_errors(correct: tuple[int, int], num_photos: int, expected: bool):
    assert is_chance(*(number / num_photos for number in correct), num_photos) == expected


def test_a_run_is_listed_while_it_is_moved_aside(worse: Run):
    record_best_stage(worse)
    storage.delete(f"{worse.model_uri('frozen')}.json")
    assert status.find_model(worse) is None


def test_a_model_whose_file_is_gone_is_unfinished(worse: Run):
    storage.delete(f"{worse.model_uri('frozen')}.safetensors")
    assert worse.unfinished_stages == ["frozen"]


def test_training_a_finished_run_whose_model_is_damaged_is_an_error(tmp_path: Path):
    publish_dataset(tmp_path, splits={"train": 1, "val": 1})
    run = begin(tmp_path, SETTINGS, load_run_inputs(str(tmp_path), SETTINGS)[1])
    for stage in run.stages:
        finish(run, stage=stage)
    train_run(run.root, SETTINGS)
    Path(f"{run.model_uri('frozen')}.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"frozen/best.safetensors is damaged: .* Delete both files and run jobs/train"):
        train_run(run.root, SETTINGS)


def test_a_run_from_before_the_record_is_found_with_its_best_stage(worse: Run):
    assert not storage.exists(f"{worse.uri}/model.json")
    assert bias_of(worse.model_uri(find_run(worse.root, "both").best_stage)) == BIAS["frozen"]
