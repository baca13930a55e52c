"""Findings of a survey in words, and warnings that a user needs before a pipeline runs."""

import importlib.util
import statistics
from itertools import count

from carclass.config.installation import detectron2_command
from carclass.data.dataset import SPLITS
from carclass.experiments.machine import Machine
from carclass.formatting import count_text
from carclass.ingestion.split import MIN_VAL_PHOTOS, count_held_out
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
        sizes = smallest if smallest == largest else f"{smallest} to {largest}, median {median}"
        rows.append(("image sizes", f"{sizes} ({count_text(len(longer), 'photo')} sampled)"))
    for reason, examples in _problems_by_reason(sample).items():
        key, detail = examples[0]
        text = f"{len(examples)} of {count_text(sample.number, 'photo')} sampled, such as {key!r} ({detail})"
        rows.append((f"unusable, {reason}", text))
    return rows


def _problems_by_reason(sample: PhotoSample) -> dict[str, list[tuple[str, str]]]:
    """Return (key, detail) of the unusable photos of a sample by reason."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key, text in sample.problems.items():
        reason, _, detail = text.partition(": ")
        found.setdefault(reason, []).append((key, detail))
    return found


def find_obstacle(survey: Survey) -> str | None:
    """Return what to do before a pipeline can run: photos that train, val or test lack; None if it can."""
    missing = [split for split, number in survey.splits.items() if not number]
    if "train" not in missing and sum(counts["train"] > 0 for counts in survey.class_splits.values()) < 2:
        return "add train photos of a second class: all are of one, and training needs at least two"
    if not missing:
        return None
    where = " and ".join(missing)
    if any(split not in survey.shares for split in missing):
        return f"add photos: none is in {where}"
    return f"add photos: none is in {where}, and a class needs at least {_fewest_photos(survey)} to be in all splits"


def _fewest_photos(survey: Survey) -> int:
    """Return the photos of a class, of which some are held out, that are enough for all splits."""
    return next(number for number in count(1) if all(count_held_out(number, survey.shares).values()))


def _describe_incomplete(survey: Survey) -> str | None:
    """Return the classes without photos in some split, and what to do; None if there are none."""
    lacking: dict[str, list[str]] = {}
    for name, counts in survey.class_splits.items():
        if missing := [split for split in SPLITS if not counts[split]]:
            lacking.setdefault(", ".join(f"no {split}" for split in missing), []).append(name)
    if not lacking:
        return None
    number, found = sum(map(len, lacking.values())), [f"{text}: {_name_some(names)}" for text, names in lacking.items()]
    enough = f" (a class needs at least {_fewest_photos(survey)} for all splits)" if survey.shares else ""
    return (
        f"{number} of {len(survey.subsets)} classes {'lacks' if number == 1 else 'lack'} photos in a split "
        f"({'; '.join(found)}). A class without train photos is never predicted, and one without val or test photos is "
        f"not measured: add photos{enough}, or take the class out of the source."
    )


def _name_some(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")


def list_warnings(survey: Survey, machine: Machine) -> list[str]:
    """Return what a user needs to know of the data and of this machine."""
    texts = [] if (incomplete := _describe_incomplete(survey)) is None else [incomplete]
    if few := [name for name, counts in survey.class_splits.items() if 0 < counts["val"] < MIN_VAL_PHOTOS]:
        texts.append(
            f"{len(few)} of {len(survey.subsets)} classes {'has' if len(few) == 1 else 'have'} fewer than "
            f"{MIN_VAL_PHOTOS} val photos ({_name_some(few)}): compare models by the accuracy over all classes."
        )
    if problems := survey.sample.problems:
        total, share = sum(survey.class_sizes.values()), len(problems) / survey.sample.number
        texts.append(
            f"{len(problems)} of {count_text(survey.sample.number, 'photo')} sampled are unusable: of all {total:,}, "
            f"about {round(share * total):,} will be quarantined, so that the counts above will be lower."
        )
    if not machine.gpus:
        texts.append("No GPU here: the settings are for CPUs. Run this again on a machine with a GPU to train there.")
    if importlib.util.find_spec("detectron2") is None:
        texts.append(f"Detectron2, which `mask` needs, is missing here. Run once: {detectron2_command()}")
    return texts
