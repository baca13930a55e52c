"""Tables of loaded results: runs, datasets, sweeps and comparisons."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import carclass
from carclass.data.dataset import SPLITS
from carclass.errors import UserError
from carclass.experiments.report import comparison_table
from carclass.experiments.results import Comparison
from carclass.prediction.loaded_run import LoadedRun
from carclass.reporting.notebook import facts_html
from carclass.runs.run import Run
from tests.helpers.evaluated_run import CLASSES, publish_evaluated_run
from tests.helpers.trees import sixteen

FORMAT_1 = Path(__file__).with_name("format_1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Publish an evaluated run on the dataset v1."""
    folder = tmp_path_factory.mktemp("root")
    yield publish_evaluated_run(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def loaded(run: Run) -> LoadedRun:
    return carclass.load_run(run.uri)


def test_the_report_of_a_run_has_a_row_per_class_and_the_averages(loaded: LoadedRun):
    report = loaded.report()
    assert list(report.index) == [*CLASSES, "macro average", "weighted average"]
    assert list(report.columns) == ["precision", "recall", "f1", "support"]
    assert list(report["support"]) == [3, 3, 3, 9, 9]


def test_the_confusion_of_a_run_has_the_true_classes_as_rows(loaded: LoadedRun):
    confusion = loaded.confusion()
    assert loaded.predictions is not None
    wrong = [row for row in loaded.predictions.to_pylist() if row["label"] == "Ardo" and row["predicted"] == "Belmar"]
    assert (list(confusion.index), list(confusion.columns)) == (CLASSES, CLASSES)
    assert confusion.loc["Ardo", "Belmar"] == len(wrong)
    assert list(confusion.sum(axis=1)) == [3, 3, 3]


def test_the_mistakes_of_a_run_are_the_most_confident_first(loaded: LoadedRun):
    mistakes = loaded.mistakes(4)
    assert len(mistakes) == 4
    assert (mistakes["label"] != mistakes["predicted"]).all()
    assert mistakes["confidence"].is_monotonic_decreasing


def test_the_summary_of_a_run_has_its_accuracies(loaded: LoadedRun):
    summary = loaded.summary()
    assert loaded.evaluation is not None
    assert (summary["model"], summary["test photos"], summary["dataset"]) == ("frozen epoch 1", 9, "v1")
    assert summary["test accuracy"] == loaded.evaluation["accuracy"]


def test_the_history_of_a_run_has_a_row_per_epoch(loaded: LoadedRun):
    assert list(loaded.history()["val_accuracy"]) == [0.5]


def test_a_run_and_a_dataset_are_printed_in_short(loaded: LoadedRun, run: Run):
    assert repr(loaded) == f"LoadedRun({run.uri}, stage {loaded.stage})"
    assert repr(carclass.load_dataset(f"{run.root}/datasets/v1")) == f"LoadedDataset({run.root}/datasets/v1)"


def test_a_run_is_shown_in_a_notebook(loaded: LoadedRun):
    html = loaded._repr_html_()
    assert "<b>run first</b>" in html
    assert "frozen epoch 1" in html


def test_a_run_that_was_not_evaluated_has_a_summary_and_no_report(run: Run, tmp_path: Path):
    copy = shutil.copytree(run.uri, tmp_path / "experiments" / "first")
    shutil.rmtree(copy / "report")
    loaded = carclass.load_run(copy)
    assert "test accuracy" not in loaded.summary()
    for table in (loaded.report, loaded.confusion, loaded.mistakes):
        with pytest.raises(UserError, match=r"was not evaluated .*jobs/evaluate\.py --run first --stage frozen"):
            table()


def test_a_dataset_is_counted_by_class_and_split(run: Run):
    data = carclass.load_dataset(f"{run.root}/datasets/v1/")
    summary = data.summary()
    assert (list(summary.index), list(summary.columns)) == (CLASSES, [*SPLITS, "total"])
    assert (summary["total"] == 9).all()
    assert (len(data.photos), len(data.quarantined), data.classes) == (27, 0, CLASSES)
    assert "image" not in data.photos
    assert "<b>dataset v1</b>" in data._repr_html_()


def test_photos_of_a_dataset_are_images_in_the_order_of_their_keys(run: Run):
    data = carclass.load_dataset(f"{run.root}/datasets/v1")
    keys = list(data.photos["key"])[:2]
    first, second = (image.tobytes() for image in data.images(keys))
    assert [image.tobytes() for image in data.images(keys[::-1])] == [second, first]


def test_a_key_that_a_dataset_does_not_have_is_named(run: Run):
    with pytest.raises(UserError, match=r"dataset `v1` has no photo with the key 'lost\.jpg'"):
        carclass.load_dataset(f"{run.root}/datasets/v1").images(["lost.jpg"])


def test_a_sweep_has_a_table_of_trials():
    sweep = carclass.load_sweep(FORMAT_1 / "sweeps" / "head")
    assert list(sweep.trials["state"]) == ["complete", "complete"]
    assert sweep.best in [trial.trial.values for trial in sweep.result.trials]
    assert sweep.summary()
    assert "<b>sweep head</b>" in sweep._repr_html_()
    assert repr(sweep).startswith("LoadedSweep(head, ")


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    compared = sixteen()
    pq.write_table(comparison_table(compared), tmp_path / "comparison.parquet", write_page_checksum=True)
    return compared


def test_a_comparison_has_a_table_of_runs(comparison: Comparison, tmp_path: Path):
    loaded = carclass.load_comparison(tmp_path)
    assert list(loaded.runs.index) == [run.name for run in comparison.runs]
    assert list(loaded.summary().index) == [run.name for run in comparison.finished]
    assert comparison.best.name in loaded._repr_html_()
    assert repr(loaded).startswith(f"LoadedComparison({tmp_path}")


def test_a_comparison_without_a_finished_run_is_shown(comparison: Comparison, tmp_path: Path):
    table = pq.read_table(tmp_path / "comparison.parquet")
    states = table.schema.get_field_index("state")
    table = table.set_column(states, "state", pa.array(["missing"] * len(table)))
    pq.write_table(table, tmp_path / "comparison.parquet", write_page_checksum=True)
    assert "finished" in carclass.load_comparison(tmp_path)._repr_html_()


@pytest.mark.parametrize(
    ("load", "place", "message"),
    [
        (carclass.load_dataset, "experiments/first", "is not a dataset. Give the folder <root>/datasets/<name>"),
        (carclass.load_dataset, "datasets/lost", "no dataset `lost`"),
        (carclass.load_sweep, "datasets/v1", "is not a sweep. Give the folder <root>/sweeps/<name>"),
        (carclass.load_sweep, "sweeps/lost", "no sweep `lost`"),
        (carclass.load_comparison, "comparison", "is not a comparison: it has no comparison.parquet"),
    ],
)
def test_a_place_without_such_a_result_is_named(tmp_path: Path, load, place: str, message: str):
    with pytest.raises(UserError, match=message):
        load(tmp_path / place)


def test_text_is_escaped_in_notebooks():
    assert "<script" not in facts_html("<script>", [("<script>", "<script>")])
