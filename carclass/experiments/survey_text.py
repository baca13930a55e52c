"""Findings of a survey in words, and warnings that a user needs before a pipeline runs."""

import importlib.util
import statistics

from carclass.config.installation import detectron2_command
from carclass.experiments.machine import Machine
from carclass.ingestion.split import MIN_VAL_PHOTOS
from carclass.ingestion.survey import PhotoSample, Survey

MAX_NAMES = 5
"""Classes that are named in a warning."""
Row = tuple[str, str]


def describe_survey(survey: Survey) -> list[Row]:
    """Return the findings on a source as (name, text)."""
    sizes = survey.class_sizes
    smallest, largest = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    median = statistics.median_low(sizes.values())
    per_class = f"fewest {sizes[smallest]:,} ({smallest}), median {median:,}, most {sizes[largest]:,} ({largest})"
    if sizes[smallest] == sizes[largest]:  # no class is the smallest
        per_class = f"{median:,} of each"
    rows = [
        ("layout", survey.layout),
        ("photos", f"{sum(sizes.values()):,} of {len(sizes):,} classes"),
        ("photos per class", per_class),
        ("splits", ", ".join(_describe_split(survey, split) for split in survey.splits)),
    ]
    if survey.settings.labels is not None:
        rows.append(("labels", survey.settings.labels))
    if survey.settings.columns:
        rows.append(("columns", ", ".join(f"{role}: {name}" for role, name in survey.settings.columns.items())))
    for reason, (number, examples) in survey.rejected.items():
        rows.append((f"set aside, {reason}", f"{number:,}, such as {', '.join(map(repr, examples))}"))
    return [*rows, *_describe_sample(survey.sample)]


def _describe_split(survey: Survey, split: str) -> str:
    number = f"{split} {survey.splits[split]:,}"
    if split == "train":
        return number
    return (
        f"{number} ({survey.shares[split]:.0%} held out)" if split in survey.shares else f"{number} (the source's own)"
    )


def _describe_sample(sample: PhotoSample) -> list[Row]:
    rows = []
    if sample.sides:
        shorter, longer = zip(*sample.sides, strict=True)
        smallest, largest = (f"{edge(longer)}x{edge(shorter)}" for edge in (min, max))
        median = f"{statistics.median_low(longer)}x{statistics.median_low(shorter)}"
        rows.append(("image sizes", f"{smallest} to {largest}, median {median} ({len(longer)} photos sampled)"))
    for reason, examples in _problems_by_reason(sample).items():
        key, detail = examples[0]
        text = f"{len(examples)} of {sample.number} photos sampled, such as {key!r} ({detail})"
        rows.append((f"unusable, {reason}", text))
    return rows


def _problems_by_reason(sample: PhotoSample) -> dict[str, list[tuple[str, str]]]:
    """Return (key, detail) of the unusable photos of a sample by reason."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key, text in sample.problems.items():
        reason, _, detail = text.partition(": ")
        found.setdefault(reason, []).append((key, detail))
    return found


def list_warnings(survey: Survey, machine: Machine) -> list[str]:
    """Return what a user needs to know of the data and of this machine."""
    texts = []
    if few := [name for name, counts in survey.class_splits.items() if counts["val"] < MIN_VAL_PHOTOS]:
        names = ", ".join(few[:MAX_NAMES]) + (", …" if len(few) > MAX_NAMES else "")
        texts.append(
            f"{len(few)} of {len(survey.subsets)} classes have fewer than {MIN_VAL_PHOTOS} val photos ({names}): "
            "compare models by the accuracy over all classes."
        )
    for split, number in survey.splits.items():
        if not number:
            can_give = split in survey.shares and any(counts["train"] > 1 for counts in survey.class_splits.values())
            advice = f", or set a larger `{split}_fraction` in the file" if can_give else ""
            texts.append(f"No photo is in {split}: add photos{advice}.")
    if problems := survey.sample.problems:
        total, share = sum(survey.class_sizes.values()), len(problems) / survey.sample.number
        texts.append(
            f"{len(problems)} of {survey.sample.number} photos sampled are unusable: of all {total:,}, about "
            f"{round(share * total):,} will be quarantined, so that the counts above will be lower."
        )
    if not machine.gpus:
        texts.append("No GPU here: the settings are for CPUs. Run this again on a machine with a GPU to train there.")
    if importlib.util.find_spec("detectron2") is None:
        texts.append(f"Detectron2, which `mask` needs, is missing here. Run once: {detectron2_command()}")
    return texts
