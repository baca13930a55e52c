"""A sweep's records: what is written is read again, a name stands for one search, and trials have names to read."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from carclass.config import cli
from carclass.errors import UserError
from carclass.tuning import search_space, trial_records
from carclass.tuning.trial_records import Trial, TrialRecords

LR = "train.unfrozen.lr"


def load(root: Path, experiment: dict[str, Any] | None = None, **more: Any) -> search_space.Space:
    root.mkdir(exist_ok=True)
    (root / "experiment.yml").write_text(yaml.safe_dump({"root": ".", "train": {"name": "one", **(experiment or {})}}))
    path = root / "search.yml"
    varied = {LR: {"min": 1e-4, "max": 1e-3}}
    path.write_text(yaml.safe_dump({"name": "s", "experiment": "experiment.yml", "space": varied, **more}))
    return search_space.load_space(path, cli.load_config(path, {}, search_space.Search))


def test_records_are_read_as_they_were_written(tmp_path: Path):
    given = [Trial(number=i, values={LR: i / 1000}, seed=1, state="pruned") for i in (1, 0)]
    book = TrialRecords(str(tmp_path))
    for one in given:
        book.put(one)
    assert list(TrialRecords(str(tmp_path)).found.values()) == given[::-1]


def test_a_trial_that_is_not_over_is_left(tmp_path: Path):
    book = TrialRecords(str(tmp_path))
    for number, state in enumerate(("complete", "pruned", "failed", "begun")):
        book.put(Trial(number=number, values={}, seed=1, state=state))
    assert book.left(range(5)) == [3, 4]


def test_a_trial_s_folder_can_be_read_by_people():
    assert Trial(number=7, values={LR: 3e-4, "train.augmentation.flip": "none"}, seed=1).name == "007_lr=3e-4_flip=none"


def test_a_trial_s_folder_has_no_sign_that_names_may_not_have():
    assert Trial(number=7, values={"train.parent": "s3://a b/c+d"}, seed=1).name == "007_parent=s3-a_b-c-d"


def test_a_repetition_says_its_seed():
    assert Trial(number=7, values={LR: 1e-3}, seed=124, repeats=3).title == "lr=1e-3 seed=124"


def test_a_sweep_goes_on_with_the_same_search(tmp_path: Path):
    trial_records.begin_records(load(tmp_path))
    trial_records.find_records(load(tmp_path), resume=False).put(Trial(number=0, values={LR: 1e-3}, seed=1))
    assert trial_records.find_records(load(tmp_path), resume=True).found[0].values == {LR: 1e-3}


@pytest.mark.parametrize("change", [{"max_concurrent_trials": 3}, {"num_seeds": 5}, {"devices_per_worker": 2}])
def test_what_trials_run_on_may_change_when_a_sweep_goes_on(tmp_path: Path, change: dict[str, Any]):
    trial_records.begin_records(load(tmp_path))
    trial_records.find_records(load(tmp_path, **change), resume=False)


@pytest.mark.parametrize("change", [{"num_trials": 3}, {"seed": 5}, {"scheduler": "median"}])
def test_another_search_of_the_same_name_is_refused(tmp_path: Path, change: dict[str, Any]):
    trial_records.begin_records(load(tmp_path))
    with pytest.raises(UserError, match=f"other settings \\({next(iter(change))}.*another `name`"):
        trial_records.find_records(load(tmp_path, **change), resume=False)


def test_a_search_around_another_experiment_is_refused(tmp_path: Path):
    trial_records.begin_records(load(tmp_path))
    with pytest.raises(UserError, match=r"other settings \(train.precision\)"):
        trial_records.find_records(load(tmp_path, {"precision": "fp32"}), resume=False)


def test_looking_for_a_sweep_writes_nothing(tmp_path: Path):
    trial_records.find_records(load(tmp_path), resume=False)
    assert not (tmp_path / "sweeps").exists()


def test_a_sweep_is_found_by_its_name(tmp_path: Path):
    trial_records.begin_records(load(tmp_path))
    found, _ = trial_records.load_records(str(tmp_path), "s")
    assert found.dimensions == load(tmp_path).dimensions


def test_a_sweep_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path):
    trial_records.begin_records(load(tmp_path))
    with pytest.raises(UserError, match=r"no sweep `t`.*There: s\."):
        trial_records.load_records(str(tmp_path), "t")
