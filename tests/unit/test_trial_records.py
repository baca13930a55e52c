"""Records of a sweep: storage, conflicts of names, and names of trials."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from carclass.config import cli
from carclass.errors import UserError
from carclass.tuning import search_space, trial_records, tune
from carclass.tuning.collect import collect_sweep
from carclass.tuning.trial_records import Trial, TrialRecords

LR = "train.unfrozen.lr"


def load(root: Path, experiment: dict[str, Any] | None = None, **more: Any) -> search_space.SearchSpace:
    root.mkdir(exist_ok=True)
    (root / "experiment.yml").write_text(yaml.safe_dump({"root": ".", "train": {"name": "one", **(experiment or {})}}))
    path = root / "search.yml"
    varied = {LR: {"min": 1e-4, "max": 1e-3}}
    path.write_text(yaml.safe_dump({"name": "s", "experiment": "experiment.yml", "space": varied, **more}))
    return search_space.load_space(path, cli.load_config(path, {}, search_space.Search))


def test_records_round_trip(tmp_path: Path):
    trials = [Trial(number=i, values={LR: i / 1000}, seed=1, state="pruned") for i in (1, 0)]
    records = TrialRecords(str(tmp_path))
    for trial in trials:
        records.put(trial)
    assert list(TrialRecords(str(tmp_path)).trials.values()) == trials[::-1]


def test_unfinished_trials(tmp_path: Path):
    records = TrialRecords(str(tmp_path))
    for number, state in enumerate(("complete", "pruned", "failed", "begun")):
        records.put(Trial(number=number, values={}, seed=1, state=state))
    assert records.unfinished(range(5)) == [3, 4]


def test_name_of_trial():
    assert Trial(number=7, values={LR: 3e-4, "train.augmentation.flip": "none"}, seed=1).name == "007_lr=3e-4_flip=none"


def test_name_of_trial_has_safe_characters_only():
    assert Trial(number=7, values={"train.parent": "s3://a b/c+d"}, seed=1).name == "007_parent=s3-a_b-c-d"


def test_title_of_repeat_has_the_seed():
    assert Trial(number=7, values={LR: 1e-3}, seed=124, repeats=3).title == "lr=1e-3 seed=124"


def test_sweep_is_resumed_with_the_same_search(tmp_path: Path):
    trial_records.begin_records(load(tmp_path))
    trial_records.find_records(load(tmp_path), resume=False).put(Trial(number=0, values={LR: 1e-3}, seed=1))
    assert trial_records.find_records(load(tmp_path), resume=True).trials[0].values == {LR: 1e-3}


@pytest.mark.parametrize("change", [{"max_concurrent_trials": 3}, {"num_seeds": 5}, {"devices_per_worker": 2}])
def test_machine_settings_may_change_on_resume(tmp_path: Path, change: dict[str, Any]):
    trial_records.begin_records(load(tmp_path))
    trial_records.find_records(load(tmp_path, **change), resume=False)


def test_a_finished_sweep_is_analysed_with_the_seeds_that_it_was_last_run_with(tmp_path: Path):
    root = str(shutil.copytree(Path(__file__).with_name("format_1"), tmp_path / "root"))
    space, records = trial_records.load_records(root, "head")  # with one seed
    trial_records.begin_records(replace(space, search=space.search.model_copy(update={"num_seeds": 2})))
    tune._run_search(space, records, tune.make_scheduler(space))
    assert collect_sweep(root, "head").num_seeds == 1


@pytest.fixture
def former_root(tmp_path: Path) -> Path:
    """Return a root with a sweep of two complete trials, of three epochs each."""
    return shutil.copytree(Path(__file__).with_name("format_1"), tmp_path / "root")


def trial_folder(root: Path, number: int) -> Path:
    _, records = trial_records.load_records(str(root), "head")
    return root / "sweeps" / "head" / "trials" / records.trials[number].name


def cut_metrics(folder: Path) -> None:
    """Remove the line of the best epoch, the first."""
    file = folder / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))


def test_facts_of_a_sweep_begin_with_a_capital_as_on_other_pages(former_root: Path):
    assert all(name[0].isupper() for name, _ in collect_sweep(str(former_root), "head").facts)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "metrics.jsonl").unlink(), "is missing"),
        (lambda folder: (folder / "metrics.jsonl").write_text(""), "is missing or has no epoch"),
        (shutil.rmtree, "is missing"),
        (cut_metrics, "is cut short: it lacks epoch 1"),
    ],
    ids=["no file", "an empty file", "no folder", "cut"],
)
def test_a_complete_trial_without_its_metrics_is_lost(former_root: Path, damage: Any, reason: str):
    damage(trial_folder(former_root, 0))
    sweep = collect_sweep(str(former_root), "head")
    assert [result.trial.state for result in sweep.trials] == ["lost", "complete"]
    assert reason in str(sweep.trials[0].trial.reason)
    assert "Restore" in str(sweep.trials[0].trial.reason)
    assert sweep.best.trial.number == 1


@pytest.mark.parametrize(("damage", "state"), [(cut_metrics, "complete"), (shutil.rmtree, "begun")])
def test_a_lost_trial_is_named_and_trained_again_once_its_folder_is_deleted(
    former_root: Path, caplog: pytest.LogCaptureFixture, damage: Any, state: str
):
    damage(trial_folder(former_root, 0))
    space, records = trial_records.load_records(str(former_root), "head")
    tune.reopen_trials(space, records)
    assert [records.trials[number].state for number in (0, 1)] == [state, "complete"]
    is_named = "trial 0 is lost: " in caplog.text and "or delete it and run the same command again" in caplog.text
    assert is_named == (state == "complete")


def test_the_size_of_forward_passes_may_change_on_resume(tmp_path: Path):
    trial_records.begin_records(load(tmp_path))
    trial_records.find_records(load(tmp_path, {"unfrozen": {"micro_batch_size": 4}}), resume=True)


@pytest.mark.parametrize("change", [{"num_trials": 15}, {"seed": 5}, {"scheduler": "median"}])
def test_other_search_of_the_same_name_is_refused(tmp_path: Path, change: dict[str, Any]):
    trial_records.begin_records(load(tmp_path))
    with pytest.raises(UserError, match=f"other settings \\({next(iter(change))}.*another `name`"):
        trial_records.find_records(load(tmp_path, **change), resume=False)


def test_a_search_may_grow(tmp_path: Path):
    trial_records.begin_records(load(tmp_path, num_trials=2))
    grown = trial_records.find_records(load(tmp_path, num_trials=4), resume=True)
    assert grown.searched(4) == [0, 1, 2, 3, 4]


def test_a_finished_search_that_grows_keeps_the_numbers_of_its_trials_and_repeats(tmp_path: Path):
    records = TrialRecords(str(tmp_path))
    for number, repeats in enumerate((None, None, None, 1, 2)):
        records.put(Trial(number=number, values={}, seed=1, repeats=repeats, state="complete"))
    assert records.searched(2) == [0, 1, 2]
    assert records.searched(4) == [0, 1, 2, 5, 6]


def test_search_of_other_experiment_is_refused(tmp_path: Path):
    trial_records.begin_records(load(tmp_path))
    with pytest.raises(UserError, match=r"other settings \(train.precision\)"):
        trial_records.find_records(load(tmp_path, {"precision": "fp32"}), resume=False)


def test_trials_of_unknown_settings_are_not_continued(former_root: Path):
    space, _ = trial_records.load_records(str(former_root), "head")
    Path(trial_records.sweep_uri(str(former_root), "head"), "search.yml").unlink()
    with pytest.raises(UserError, match=r"has no search.yml, but trials .* delete the folder"):
        trial_records.find_records(space, resume=False)


def test_find_records_writes_nothing(tmp_path: Path):
    trial_records.find_records(load(tmp_path), resume=False)
    assert not (tmp_path / "sweeps").exists()


def test_sweep_is_loaded_by_name(tmp_path: Path):
    trial_records.begin_records(load(tmp_path))
    space, _ = trial_records.load_records(str(tmp_path), "s")
    assert space.dimensions == load(tmp_path).dimensions


def test_unknown_sweep_lists_the_existing_ones(tmp_path: Path):
    trial_records.begin_records(load(tmp_path))
    with pytest.raises(UserError, match=r"no sweep `t`.*Available: s\."):
        trial_records.load_records(str(tmp_path), "t")
