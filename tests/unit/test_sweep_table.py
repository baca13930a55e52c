"""Table of the trials of a sweep: rows, types of settings, epochs."""

import math

from carclass.tuning import report
from carclass.tuning.search_space import Dimension
from tests.helpers.sweeps import (
    DIMENSIONS,
    LR,
    make_epochs,
    make_result,
    make_sweep,
)


def test_table_has_a_row_per_trial_and_repeat():
    table = report.trials_table(make_sweep())
    assert table["repeats"].to_pylist()[18:22] == [None, None, *[make_sweep().complete[0].trial.number] * 2]


def test_table_keeps_types_of_settings():
    table = report.trials_table(make_sweep())
    types = [str(table.schema.field(dimension.key).type) for dimension in DIMENSIONS]
    assert types == ["double", "int64", "bool", "double"]


def test_mixed_types_become_text():
    results = [make_result(n, make_epochs(0.8), values={LR: v}) for n, v in enumerate((True, 0.5, None, "x"))]
    sweep = make_sweep(trials=results, dimensions=[Dimension(key=LR, choices=(True, 0.5, None, "x"))], repeats=False)
    assert report.trials_table(sweep)[LR].to_pylist() == ["true", "0.5", None, "x"]


def test_integers_and_floats_become_floats():
    results = [make_result(n, make_epochs(0.8), values={LR: v}) for n, v in enumerate((1, 0.5))]
    sweep = make_sweep(trials=results, dimensions=[Dimension(key=LR, low=0.0, high=1.0)], repeats=False)
    assert report.trials_table(sweep)[LR].to_pylist() == [1.0, 0.5]


def test_table_has_every_epoch():
    curves = report.trials_table(make_sweep())["val_accuracies"].to_pylist()
    assert curves == [[row["val_accuracy"] for row in result.epochs] for result in make_sweep().trials]


def test_trial_without_epochs_has_no_accuracy():
    row = report.trials_table(make_sweep()).to_pylist()[7]
    assert (row["state"], row["accuracy"], row["best_epoch"], row["finished"]) == ("failed", None, None, None)


def test_best_epoch_is_earliest_of_equals_and_ignores_nan():
    epochs = make_epochs(0.8, 4)
    for row, accuracy in zip(epochs, (0.3, 0.6, 0.6, math.nan), strict=True):
        row["val_accuracy"] = accuracy
    sweep = make_sweep(trials=[make_result(0, epochs)], repeats=False)
    assert report.trials_table(sweep)["best_epoch"].to_pylist() == [2]
