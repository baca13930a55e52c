"""First config file of a user's own photos: settings that fit the data and the machine, with comments."""

import statistics
import textwrap
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from carclass.config import cli, yaml_file
from carclass.config.ingest_settings import IngestSettings
from carclass.config.schema import (
    Config,
    FrozenSettings,
    MaskSettings,
    ModelSettings,
    TrainSettings,
    UnfrozenSettings,
)
from carclass.data import dataset
from carclass.errors import UserError
from carclass.experiments import estimate
from carclass.experiments.estimate import Photos
from carclass.experiments.machine import Machine
from carclass.formatting import duration_text, terminal_text
from carclass.ingestion.survey import Survey

GPU_SIZE, CPU_SIZE, MIN_SIZE, SIZE_STEP = 224, 128, 64, 32
"""Sides of the network's input in pixels; on CPUs, both stages at 128 px are more accurate than one at 224."""
EPOCHS, CPU_EPOCHS, BATCH_SIZE = (30,), (30, 15), 32
"""Epochs and batch size of the unfrozen stage; on CPUs the first number that ends within MAX_CPU_SECONDS."""
MAX_CPU_SECONDS = 4 * 3600
MIN_STEPS, HEAD_BATCHES = 8, (128, 64, 32, 16)
"""Fewest steps of an epoch, and batch sizes of the classifier; the default first."""
SMALL_BATCH, SMALL_BATCH_LR = 8, 1.5e-4
"""Batch size and learning rate, of the same ratio as the defaults, of the unfrozen stage for few photos.

Measured at 128 px on photos for 3 and for 6 steps of 32 an epoch: val accuracy is 0.04 to 0.15 higher than with the
defaults (docs/ablations.md).
"""
USABLE_SHARE = 0.8
"""Share of the memory for a training step."""
DOWNLOADS = (
    "ResNet50 (about 100 MB) from download.pytorch.org and Mask R-CNN (about 180 MB) from dl.fbaipublicfiles.com, "
    "once, before the first step"
)
"""Weights of the chosen settings."""
WIDTH = 116
"""Characters of a comment."""
COMMENTS = {
    "root": "All results are written below it. It may be an s3:// prefix.",
    "ingest": "Photos and labels become the dataset v1: read, checked, split.",
    "ingest.columns": "Columns of the table of labels, by what they hold.",
    "ingest.test_fraction": "Share of each class that is held out for test, as the source has no test photos.",
    "ingest.val_fraction": "Share of each class's train photos that is held out to choose epochs and settings.",
    "mask": "Mask R-CNN finds the vehicle, and the background is removed: dataset v2. To train on whole photos, delete "
    "this line and add `dataset: v1` to `train`. To see 40 masks first: jobs/mask.py --config FILE --preview 40.",
    "train": "ResNet50, from ImageNet's weights: first the classifier, then all layers.",
    "train.name": "Name of the run; another name trains another run.",
    "train.num_workers": "One for each GPU.",
    "train.unfrozen.micro_batch_size": "Photos per forward pass, as a whole batch does not fit into memory.",
}
"""Comments above settings, by dotted key."""
Values = dict[str, Any]


def check_output(output: str, photos: str, *, overwrite: bool) -> None:
    """Raise UserError for a file that exists, cannot be written to, or would be one of the photos' files."""
    path = Path(output)
    if path.is_dir():
        raise UserError(f"`--output`: {output} is a folder. Give the name of a file: {output}/my.yml.")
    if path.exists() and not overwrite:
        raise UserError(f"`--output`: {output} exists. Choose another name, or add --overwrite to replace it.")
    if not path.resolve().parent.is_dir():
        raise UserError(f"`--output`: there is no folder {path.resolve().parent}. Create it, or choose another.")
    if "://" not in photos and path.resolve().is_relative_to(Path(photos).expanduser().resolve()):
        raise UserError(
            f"`--output`: {output} would lie among the photos, and each change of it would be one of the dataset. "
            "Choose a file outside of their folder: --output ../my.yml."
        )


def choose_root(results: Path, ingest: IngestSettings) -> str:
    """Return the given folder of results, or the first with -2, -3 … that has no dataset of other photos."""
    roots = (f"{results}-{number}" if number > 1 else str(results) for number in count(1))
    return next(root for root in roots if not _has_other_photos(root, ingest))


def _has_other_photos(root: str, ingest: IngestSettings) -> bool:
    published = dataset.find_dataset(root, ingest.dataset)
    return published is not None and published.manifest["settings"].get("photos") != ingest.photos


def choose_settings(root: str, survey: Survey, machine: Machine) -> Config:
    """Return the settings of a pipeline that fit photos and machine; all others have their defaults."""
    ingest = survey.settings.model_copy(update={f"{split}_fraction": share for split, share in survey.shares.items()})
    train = _choose_training(survey, machine)
    if len(machine.gpus) > 1:
        train = train.model_copy(update={"num_workers": len(machine.gpus)})
    return Config(root=root, ingest=ingest, mask=MaskSettings(), train=train)


def planned_photos(survey: Survey) -> Photos:
    """Return the photos of a survey, with the size and the time of those that were sampled."""
    if not survey.sample.sides:
        return Photos(survey.splits)
    return Photos(survey.splits, survey.sample.stored_bytes, survey.sample.seconds)


def _choose_training(survey: Survey, machine: Machine) -> TrainSettings:
    """Return the stages: on CPUs a shorter unfrozen stage, or none, where it would take too long."""
    frozen = FrozenSettings(epochs=80, batch_size=_head_batch(survey.splits["train"]))
    for epochs in EPOCHS if machine.gpus else CPU_EPOCHS:
        size = _image_size(survey, GPU_SIZE if machine.gpus else CPU_SIZE)
        unfrozen = _unfrozen_stage(epochs, size, survey.splits["train"], machine)
        train = TrainSettings(name="first", model=ModelSettings(image_size=size), frozen=frozen, unfrozen=unfrozen)
        seconds = estimate.unfrozen_seconds(train, planned_photos(survey), machine)
        if machine.gpus or seconds < MAX_CPU_SECONDS:
            return train
    model = ModelSettings(image_size=_image_size(survey, GPU_SIZE))
    return TrainSettings(name="first", model=model, frozen=frozen, unfrozen=None)


def _image_size(survey: Survey, size: int) -> int:
    """Return the side of the input in pixels: `size`, or less if most photos are smaller."""
    if not survey.sample.sides:
        return size
    shorter = int(statistics.median(shorter for shorter, _ in survey.sample.sides))
    return min(size, max(MIN_SIZE, shorter // SIZE_STEP * SIZE_STEP))


def _head_batch(num_train: int) -> int:
    return next((size for size in HEAD_BATCHES if num_train >= MIN_STEPS * size), HEAD_BATCHES[-1])


def _unfrozen_stage(epochs: int, image_size: int, num_train: int, machine: Machine) -> UnfrozenSettings:
    """Return the unfrozen stage: small batches for few photos, in pieces if a whole one does not fit into memory."""
    stage = UnfrozenSettings(epochs=epochs, batch_size=BATCH_SIZE)
    if num_train < MIN_STEPS * BATCH_SIZE:
        stage = UnfrozenSettings(epochs=epochs, batch_size=SMALL_BATCH, lr=SMALL_BATCH_LR)
    available = USABLE_SHARE * min(machine.gpus, default=machine.memory) - estimate.TRAIN_BYTES
    fitting = int(available / estimate.step_bytes(image_size, on_gpu=bool(machine.gpus)))
    if fitting >= stage.batch_size:
        return stage
    return stage.model_copy(update={"micro_batch_size": 1 << max(0, fitting.bit_length() - 1)})


def render_config(settings: Config, header: Sequence[str]) -> str:
    """Return a commented config file of the settings that were chosen. header: lines of text; "" is an empty one."""
    comments = {**COMMENTS, **_training_comments(settings)}
    values = settings.model_dump(mode="json", exclude_unset=True)
    lines = [line for text in header for line in _comment(text)]
    return "\n".join([*lines, "", *_render(values, comments)]) + "\n"


def _training_comments(settings: Config) -> dict[str, str]:
    """Return the comments that depend on the stages, the size of the input and the batches."""
    assert settings.train is not None
    assert settings.train.frozen is not None
    texts = {}
    if (size := settings.train.model.image_size) < GPU_SIZE:
        texts["train.model.image_size"] = (
            f"Side of the network's input in pixels: {GPU_SIZE} is usual, {size} fits here."
        )
    if settings.train.frozen.batch_size < HEAD_BATCHES[0]:
        texts["train.frozen.batch_size"] = "Below the default 128, so that an epoch of so few photos has several steps."
    if settings.train.unfrozen is not None and settings.train.unfrozen.batch_size < BATCH_SIZE:
        texts["train.unfrozen.batch_size"] = f"Below the usual {BATCH_SIZE} for the same reason, and lr with it."
    if settings.train.unfrozen is None:
        limit = duration_text(MAX_CPU_SECONDS)
        texts["train.unfrozen"] = f"Without a GPU this stage would take more than {limit}. Delete this line on a GPU."
    return texts


def _render(values: Values, comments: dict[str, str], prefix: str = "") -> Iterator[str]:
    """Yield the lines of YAML of a section, with comments above its keys."""
    indent = "  " * prefix.count(".")
    for key, value in values.items():
        if (text := comments.get(f"{prefix}{key}")) is not None:
            yield from (f"{indent}{line}" for line in _comment(text))
        if isinstance(value, dict) and value and f"{prefix}{key}" != "ingest.columns":
            yield f"{indent}{key}:"
            yield from _render(value, comments, f"{prefix}{key}.")
        else:
            block = yaml_file.dump({key: value}).decode().rstrip("\n")
            yield textwrap.indent(block, indent)


def _comment(text: str) -> list[str]:
    """Return the lines of a comment; names of files and classes in it may have any characters."""
    plain = " ".join(terminal_text(cli.name_commands(text)).split("\n"))
    return textwrap.wrap(plain, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False) or ["#"]


def write_config(output: str, settings: Config, header: Sequence[str], *, overwrite: bool) -> None:
    """Write the config file. Raise UserError if it cannot be written, or exists and is not to be replaced."""
    text = render_config(settings, header)
    try:
        with open(output, "w" if overwrite else "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"`--output`: {output} cannot be written ({error.strerror}). Choose another file.") from error
