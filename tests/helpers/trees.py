"""Synthetic results of trees of experiments, for tests of comparisons."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from carclass.evaluation.metrics import classification_metrics
from carclass.experiments.results import ComparedRun, Comparison, TestResult

CLASSES = [f"Maker Model {i:02d}" for i in range(20)]
NUM_PHOTOS = 2000
ORIGINAL_NAME = "the original (Keras, Stanford Cars)"
HOSTILE = "<script>alert(1)</script>\"'&"
ORIGINAL_RUNS = """
001 imagenet v1 adam 1e-3 .2 H+V 25 25 .280 -
002 imagenet v1 adam 1e-4 .3 H   46 75 .306 -
003 002@12   v1 adam 5e-5 .2 H   10 100 .568 -
004 002@12   v1 sgd  1e-5 .2 H   6 100 .194 -
005 002@12   v1 sgd  3e-5 .2 H   69 100 .304 -
006 005@69   v1 sgd  5e-5 .3 H   67 100 .412 -
007 imagenet v1 adam 1e-4 .3 H+V 44 100 .252 -
008 002@12   v1 adam 3e-5 .4 H+V 29 100 .632 .52
009 imagenet v2 adam 5e-4 .3 H+V 22 100 .405 -
010 009@22   v2 adam 1e-5 .3 H+V 13 100 .599 .53
011 imagenet v2 adam 5e-3 .1 H+V 22 100 .354 -
012 imagenet v2 adam 1e-4 .3 H   38 75 .424 .33
013 012@24   v2 adam 1e-5 .3 H   21 75 .715 .6458
"""
"""Runs of the original: number, parent, dataset, optimizer, lr, dropout, flips, epochs, max_epochs, val, test."""
TREATMENT_RUNS = """
014 imagenet v1 adamw 6e-4 .2 H 30 30 - -
015 imagenet v2 adamw 6e-4 .2 H 30 30 - -
016 imagenet v3 adamw 6e-4 .2 H 30 30 - -
"""
TREATMENTS = {"v1": "none", "v2": "crop", "v3": "crop+mask"}
FLIPS = {"H": "horizontal", "H+V": "horizontal+vertical"}
OURS = {"004": 0.171, "009": 0.388, "014": 0.861, "015": 0.902, "016": 0.896}
"""Val accuracies by number; those of the other runs are slightly above the original's."""


def make_epochs(accuracy: float, number: int = 10, stage: str = "frozen") -> list[dict[str, Any]]:
    """Return the metrics of epochs whose val accuracy rises to the given one, reached in the last but one."""
    values = [accuracy * (1 - 0.8 * math.exp(-4 * epoch / number)) for epoch in range(1, number + 1)]
    values[max(0, number - 2)] = accuracy
    return [
        {
            "stage": stage,
            "epoch": epoch,
            "train_loss": 2.0 / epoch,
            "train_accuracy": 0.9,
            "val_loss": 2.5 / epoch,
            "val_accuracy": value,
            "lr": 1e-3,
            "seconds": 40.0,
        }
        for epoch, value in enumerate(values, 1)
    ]


def make_test_result(
    accuracy: float, seed: int = 1, num_photos: int = NUM_PHOTOS, report: str = "report.html"
) -> TestResult:
    """Return a test with about this accuracy. The difficulty of a photo is the same for all seeds."""
    labels = np.random.default_rng(0).integers(0, len(CLASSES), num_photos)
    difficulty = np.random.default_rng(1).random(num_photos)
    generator = np.random.default_rng(seed)
    correct = difficulty + generator.normal(0, 0.12, num_photos) < accuracy
    predicted = np.where(correct, labels, (labels + 1 + (generator.random(num_photos) ** 3 * 5).astype(int)) % 20)
    probabilities = np.full((num_photos, len(CLASSES)), 0.2 / 19)
    probabilities[np.arange(num_photos), predicted] = 0.8
    return TestResult(
        keys=[f"car_ims/{i:06d}.jpg" for i in range(num_photos)],
        image_ids=[f"{i:064x}" for i in range(num_photos)],
        correct=correct,
        metrics=classification_metrics(labels, probabilities, CLASSES),
        report=report,
    )


def make_settings(stage: str = "frozen", **changes: Any) -> dict[str, Any]:
    """Return settings of a run with one stage, by dotted key; `stage.KEY` in changes is a key of the stage."""
    stages = {
        f"{stage}.epochs": 30,
        f"{stage}.optimizer": "adam",
        f"{stage}.lr": 1e-4,
        f"{stage}.batch_size": 32,
        f"{stage}.patience": 3,
    }
    own = {"frozen.views": 2} if stage == "frozen" else {"unfrozen.layer_decay": 1.0, "unfrozen.appearance": False}
    return {
        "name": "exp",
        "dataset": "v1",
        "parent": "imagenet",
        "model.architecture": "resnet50",
        "model.image_size": 224,
        "model.dropout": 0.3,
        "augmentation.flip": "horizontal",
        **stages,
        **own,
        ("unfrozen" if stage == "frozen" else "frozen"): None,
        "num_workers": [1, 4],
        "keep_checkpoints": 2,
        "seed": 123,
        **{key.replace("stage.", f"{stage}."): value for key, value in changes.items()},
    }


def make_run(name: str = "exp_001", val: float | None = 0.6, **changes: Any) -> ComparedRun:
    """Return a finished run that starts from ImageNet; with val None it has no epochs."""
    values: dict[str, Any] = {
        "name": name,
        "parent": "imagenet",
        "parent_name": None,
        "dataset": "v1",
        "treatment": "none",
        "state": "finished",
        "reason": None,
        "settings": make_settings(name=name),
        "epochs": [] if val is None else make_epochs(val),
        "val_accuracy": val,
        "baseline_val": None,
        "baseline_test": None,
        "test": None,
    }
    return ComparedRun(**(values | changes))


def make_comparison(runs: list[ComparedRun], **changes: Any) -> Comparison:
    """Return a comparison without a baseline."""
    values: dict[str, Any] = {
        "title": "Experiments",
        "facts": [("Dataset", "Stanford Cars"), ("Runs", str(len(runs)))],
        "runs": runs,
        "baseline": None,
        "seed": 7,
    }
    return Comparison(**(values | changes))


@cache
def sixteen() -> Comparison:
    """Return the original's 13 runs with its accuracies as baseline, and one recipe on three datasets."""
    runs = [_original_run(line.split()) for line in (ORIGINAL_RUNS + TREATMENT_RUNS).split("\n") if line]
    unfinished = {
        "exp_006": {"state": "stale", "reason": "exp_005 was retrained", "test": None},
        "exp_007": {"state": "begun", "epochs": make_epochs(0.2, 12), "test": None},
        "exp_010": {"state": "diverged", "reason": "unfrozen epoch 3, step 7: loss not finite", "test": None},
        "exp_011": {"state": "missing", "epochs": [], "val_accuracy": None, "test": None},
    }
    return make_comparison([replace(run, **unfinished.get(run.name, {})) for run in runs], baseline=ORIGINAL_NAME)


def _original_run(words: list[str]) -> ComparedRun:
    number, start, dataset, optimizer, lr, dropout, flips, epochs, max_epochs, baseline_val, baseline_test = words
    name, parent = f"exp_{number}", start if start == "imagenet" else f"exp_{start}"
    stage = "frozen" if start == "imagenet" else "unfrozen"
    val = OURS.get(number) or float(baseline_val) + 0.02
    stages = {"stage.optimizer": optimizer, "stage.lr": float(lr), "stage.epochs": int(max_epochs)}
    others = {"model.dropout": float(dropout), "augmentation.flip": FLIPS[flips]}
    return make_run(
        name,
        val,
        parent=parent,
        parent_name=None if start == "imagenet" else parent.split("@")[0],
        dataset=dataset,
        treatment=TREATMENTS[dataset],
        settings=make_settings(stage, name=name, parent=parent, dataset=dataset, **stages, **others),
        epochs=make_epochs(val, int(epochs), stage),
        baseline_val=None if baseline_val == "-" else float(baseline_val),
        baseline_test=None if baseline_test == "-" else float(baseline_test),
        test=make_test_result(val - 0.03, int(number), report=f"{name}/report/report.html"),
    )


def hostile() -> Comparison:
    """Return a comparison with markup in every text that comes from data."""
    test = make_test_result(0.7, report=HOSTILE)
    test.metrics["per_class"][0] |= {"name": HOSTILE, "f1": 0.0}
    test.metrics["most_confused_pairs"][0] |= {"label": HOSTILE, "predicted": HOSTILE}
    settings = make_settings(**{"stage.optimizer": HOSTILE, "augmentation.flip": HOSTILE, HOSTILE: HOSTILE})
    texts = {"dataset": HOSTILE, "treatment": HOSTILE, "reason": HOSTILE, "test": test, "baseline_val": 0.5}
    first = make_run(HOSTILE, 0.5, parent=HOSTILE, settings=settings, **texts)
    child = make_run("child", 0.7, parent=f"{HOSTILE}@{HOSTILE}", parent_name=HOSTILE, **texts)
    facts = [(HOSTILE, HOSTILE)]
    return make_comparison([first, child], title=HOSTILE, facts=facts, baseline=HOSTILE)


def edge_case_comparisons() -> dict[str, Comparison]:
    """Return comparisons with unusual runs, by a description."""
    chain = [make_run("run-0")]
    for i in range(1, 12):
        chain.append(make_run(f"run-{i}", 0.5 + i / 50, parent=f"run-{i - 1}@{i}", parent_name=f"run-{i - 1}"))
    nan = make_epochs(0.6)
    nan[3]["val_accuracy"] = math.nan
    never = [{**row, "val_accuracy": math.nan} for row in make_epochs(0.6)]
    long = "a-very-long-name-of-a-run-that-was-generated-by-a-script-and-does-not-fit-a-table"
    uri = "s3://bucket/with/a/very/long/name/of/a/parent/model.safetensors"
    fan = [make_run("root"), *(make_run(f"leaf-{i}", i / 40, parent_name="root") for i in range(40))]
    perfect = make_test_result(9.0)
    other = replace(make_test_result(0.5), keys=[f"other/{i:06d}.jpg" for i in range(NUM_PHOTOS)])
    return {
        "one": make_comparison([make_run()]),
        "a chain": make_comparison(chain),
        "a fan": make_comparison(fan),
        "a gap": make_comparison([make_run(epochs=nan)]),
        "diverged": make_comparison([make_run(), make_run("diverged", math.nan, epochs=never, baseline_val=0.5)]),
        "one epoch": make_comparison([make_run(epochs=make_epochs(0.6, 1))]),
        "no epochs": make_comparison([make_run(epochs=[])]),
        "no settings": make_comparison([make_run(settings={}), make_run("exp_002", 0.5, settings={})]),
        "both stages": make_comparison([make_run(epochs=[*make_epochs(0.4), *make_epochs(0.6, stage="unfrozen")])]),
        "long names": make_comparison([make_run(long), make_run(f"{long}-2", parent=uri, dataset=uri)]),
        "a parent elsewhere": make_comparison([make_run(parent="exp_000@3", parent_name="exp_000")]),
        "nothing wrong": make_comparison([make_run(test=perfect), make_run("exp_002", 0.5, test=perfect)]),
        "other photos": make_comparison([make_run(test=perfect), make_run("exp_002", 0.5, test=other)]),
        "all zero": make_comparison([make_run(val=0.0, test=make_test_result(-1.0))]),
        "a circle": make_comparison([make_run("a", parent_name="b"), make_run("b", parent_name="a")]),
        "new names": make_comparison([make_run(treatment="painted"), make_run("exp_002", treatment="blurred")]),
    }
