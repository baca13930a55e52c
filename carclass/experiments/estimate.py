"""Rough time, memory and disk space of a pipeline's steps, by rates that carclass' benchmarks measured.

On CPUs: docs/benchmarks.md, per core of an AMD EPYC. On GPUs: docs/cost.md, for an A10G (training) and an L4 (masking).
Larger GPUs are up to ten times faster, and rates of smaller machines differ as much.
"""

from collections.abc import Collection
from typing import NamedTuple

from carclass.config.pipeline_sections import pipeline_runs
from carclass.config.schema import Config, MaskSettings, TrainSettings
from carclass.experiments.machine import Machine
from carclass.formatting import bytes_text, count_text, duration_text

BASIS = (
    "an otherwise idle machine; rough rates of carclass' benchmarks for cores of an AMD EPYC, an L4 (mask) and an A10G "
    "(train); others may be several times faster or slower (docs/benchmarks.md, docs/cost.md)"
)
START_SECONDS = 15.0
"""Start of a step's processes."""
INGEST_RATE = 400.0
"""Photos of 700x480 per second and core."""
INGEST_BYTE_SECONDS = 2e-8
"""Seconds of a core for a byte of a large photo: 15 to 40 ns for JPEG of 0.3 to 4.5 MB."""
MASK_RATES = {"fast": (5.0, 40.0), "exact": (0.85, 15.0)}
"""Photos per second of a core and of a GPU, by the preset of the detector."""
FORWARD_RATES = (34.0, 795.0)
"""Photos of 224 px per second of a core and of a GPU through a ResNet50, in bf16."""
TRAINING_COST = 3.0
"""Arithmetic of a training step, in forward passes."""
RELATIVE_COST = {"resnet50": 1.0, "resnet26-narrow": 0.05}
"""Arithmetic of a network, in that of a ResNet50; of networks of timm, which are not built here, 1."""
BASE_SIZE = 224
"""Side in pixels of the photos that rates and memory refer to."""
HEAD_SECONDS = 2e-5
"""Seconds of a core to train the classifier on the cached features of one photo."""
INGEST_BYTES, MASK_BYTES, TRAIN_BYTES = 1.5e9, (0.9e9, 0.9e9), 2.0e9
"""Memory of ingestion; of masking without its actors and for each; of a training worker without photos."""
STEP_BYTES = (42e6, 44e6)
"""Memory of a photo in a training step on a CPU in float32 (in bf16 half as much) and on a GPU in bf16."""
RUN_BYTES = {"resnet50": 2.0e9, "resnet26-narrow": 2.0e7}
"""Disk space of the checkpoints of both stages; of networks of timm that of a ResNet50."""
PHOTO_BYTES = 120_000
"""Size of a stored photo of 700x480, where no sample tells it."""


class Photos(NamedTuple):
    """Photos that a pipeline processes."""

    splits: dict[str, int]
    stored_bytes: int = PHOTO_BYTES  # per photo, on average
    ingest_seconds: float = 1 / INGEST_RATE  # per photo and core

    @property
    def total(self) -> int:
        """Return the number of photos."""
        return sum(self.splits.values())


def ingest_seconds(file_bytes: float) -> float:
    """Return the time of a core to convert a photo, by the size of its file."""
    return max(1 / INGEST_RATE, file_bytes * INGEST_BYTE_SECONDS)


class Step(NamedTuple):
    """A step of a pipeline."""

    name: str
    work: str  # in words
    seconds: float
    memory: float = 0.0  # bytes of all processes together
    disk: float = 0.0  # bytes that stay on the root's disk


def plan_steps(
    settings: Config,
    photos: Photos,
    machine: Machine,
    *,
    published: Collection[str] = (),
    trained: Collection[str] = (),
) -> list[Step]:
    """Return the steps of a pipeline in their order.

    published, trained: datasets and runs whose steps are left out; trained runs are evaluated nevertheless.
    """
    assert settings.ingest is not None
    steps = [] if settings.ingest.dataset in published else [_ingest_step(photos, machine)]
    if settings.mask is not None and settings.mask.dataset not in published:
        steps.append(_mask_step(settings.mask, photos, machine))
    for run, suffix in zip(pipeline_runs(settings), ("", ", unmasked"), strict=False):
        of_run = [] if run.name in trained else _train_steps(run, photos, machine)
        of_run.append(_evaluate_step(run, photos, machine))
        steps += [step._replace(name=f"{step.name}{suffix}") for step in of_run]
    return steps


def describe_steps(steps: list[Step]) -> list[tuple[str, str]]:
    """Return the steps and their sum as (name, text)."""
    rows = [(step.name, f"{step.work}: {_cost_text(step)}") for step in steps]
    total = Step("total", "", sum(step.seconds for step in steps), disk=sum(step.disk for step in steps))
    return [*rows, (total.name, _cost_text(total))]


def _cost_text(step: Step) -> str:
    texts = [f"about {duration_text(step.seconds)}"]
    texts += [f"{bytes_text(step.memory)} of memory"] if step.memory else []
    texts += [f"{bytes_text(step.disk)} on disk"] if step.disk else []
    return ", ".join(texts)


def _ingest_step(photos: Photos, machine: Machine) -> Step:
    seconds = START_SECONDS + photos.total * photos.ingest_seconds / machine.cpus
    return Step("ingest", f"{photos.total:,} photos", seconds, INGEST_BYTES, photos.total * photos.stored_bytes)


def _mask_step(settings: MaskSettings, photos: Photos, machine: Machine) -> Step:
    number = min(photos.total, settings.limit or photos.total)
    core, gpu = MASK_RATES[settings.detector.profile]
    if settings.use_gpu is not False and machine.gpus:
        actors = settings.num_actors or len(machine.gpus)
        rate, device = gpu * min(actors, len(machine.gpus)), f"{actors} GPU(s)"
    else:
        actors = settings.num_actors or machine.cpus
        rate, device = core * min(actors, machine.cpus), f"{actors} CPU(s)"
    seconds, memory = START_SECONDS + number / rate, MASK_BYTES[0] + actors * MASK_BYTES[1]
    return Step("mask", f"{number:,} photos on {device}", seconds, memory, number * photos.stored_bytes)


def _train_steps(settings: TrainSettings, photos: Photos, machine: Machine) -> list[Step]:
    """Return the stages of a run."""
    train, val = photos.splits["train"], photos.splits["val"]
    rate, memory = training_rate(settings, machine), TRAIN_BYTES
    steps = []
    if (frozen := settings.frozen) is not None:
        seconds = (frozen.views * train + val) / rate + frozen.epochs * (train + val) * HEAD_SECONDS
        work = f"{count_text(frozen.epochs, 'epoch')} on the features of {train:,} photos, "
        work += f"{count_text(frozen.views, 'view')} of each"
        steps.append(Step("train, frozen", work, START_SECONDS + seconds, memory))
    if (unfrozen := settings.unfrozen) is not None:
        seconds = unfrozen_seconds(settings, photos, machine)
        batch = min(unfrozen.batch_size, unfrozen.micro_batch_size or unfrozen.batch_size)
        memory = TRAIN_BYTES + batch * step_bytes(settings.train_size, on_gpu=uses_gpu(settings, machine))
        work = f"{count_text(unfrozen.epochs, 'epoch')} of {train:,} photos at {settings.train_size} px"
        steps.append(Step("train, unfrozen", work, START_SECONDS + seconds, memory))
    if settings.refit:
        seconds = sum(step.seconds for step in steps) * (train + val) / train
        steps.append(Step("train, refit", f"the same on {train + val:,} photos, train and val", seconds, memory))
    steps[-1] = steps[-1]._replace(disk=RUN_BYTES.get(settings.model.architecture, RUN_BYTES["resnet50"]))
    return steps


def _evaluate_step(settings: TrainSettings, photos: Photos, machine: Machine) -> Step:
    val, test = photos.splits["val"], photos.splits["test"]
    seconds = START_SECONDS + (val + test) / forward_rate(settings, machine)
    return Step("evaluate", f"{test:,} test photos", seconds)


def unfrozen_seconds(settings: TrainSettings, photos: Photos, machine: Machine) -> float:
    """Return the time of the unfrozen stage of a run that has one."""
    assert settings.unfrozen is not None
    cost = TRAINING_COST * (settings.train_size / settings.model.image_size) ** 2
    passes = cost * photos.splits["train"] + photos.splits["val"]
    return settings.unfrozen.epochs * passes / training_rate(settings, machine)


def uses_gpu(settings: TrainSettings, machine: Machine) -> bool:
    """Return True if a run trains on the machine's GPUs."""
    return settings.use_gpu is not False and len(machine.gpus) >= settings.workers[0]


def training_rate(settings: TrainSettings, machine: Machine) -> float:
    """Return the photos per second through the network, of all training workers together."""
    return forward_rate(settings, machine._replace(cpus=machine.cpus_of(settings.workers[1])))


def forward_rate(settings: TrainSettings, machine: Machine) -> float:
    """Return the photos per second through the network, of all CPUs, or of a GPU per worker."""
    core, gpu = FORWARD_RATES
    rate = gpu * settings.workers[0] if uses_gpu(settings, machine) else core * machine.cpus
    cost = RELATIVE_COST.get(settings.model.architecture, 1.0) * (settings.model.image_size / BASE_SIZE) ** 2
    return rate / cost


def step_bytes(image_size: int, *, on_gpu: bool) -> float:
    """Return the memory of a photo in a training step of a ResNet50."""
    return STEP_BYTES[on_gpu] * (image_size / BASE_SIZE) ** 2
