"""Preflight check of a pipeline: its plan, and all problems that can be known before its first step, together."""

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from carclass import progress, storage
from carclass.cluster import autoscaler, connection, resources
from carclass.config.pipeline_sections import pipeline_runs
from carclass.config.schema import Config, IngestSettings, MaskSettings, TrainSettings
from carclass.data import dataset
from carclass.data.dataset import SPLITS, Dataset
from carclass.data.draft import find_version
from carclass.data.inventory import Inventory
from carclass.data.root_check import check_root
from carclass.errors import Problems, UserError
from carclass.experiments import estimate
from carclass.experiments.machine import Machine, this_machine
from carclass.formatting import bytes_text
from carclass.ingestion import archive, ingest, split
from carclass.ingestion.inputs import ListedInputs, list_inputs
from carclass.runs.metrics_loggers import check_loggers
from carclass.runs.run import Run, check_same_settings
from carclass.training import preflight, pretrained, train

log = logging.getLogger(__name__)
COUNTS = "SELECT label, subset, count(*) FROM input WHERE label NOT NULL AND reason IS NULL GROUP BY label, subset"
SMALL_PHOTO_BYTES = 30_000
"""Bytes that stored photos have at least, on average, unless their files are smaller."""


class PlannedDataset(Dataset):
    """A dataset before it is made: its counts by class and split, if all photos are usable."""

    def read(self, columns: Any) -> pa.Table:
        """Return one row of label and split for each class that has photos in the split."""
        found = [(label, name) for label, counts in self.manifest["counts"].items() for name in counts if counts[name]]
        return pa.table(dict(zip(("label", "split"), zip(*found, strict=True), strict=True))).select(list(columns))


Planned = dict[str, Dataset]
"""Datasets that the pipeline makes, by name."""


def check_pipeline(settings: Config, inventory: Inventory, *, update: bool = False) -> ListedInputs:
    """Print the plan of a pipeline, and return its inputs, which are added to the inventory.

    update: publish datasets anew whose inputs have changed. Raise UserError, with all problems, if it cannot succeed.
    """
    problems = Problems()
    assert settings.ingest is not None
    has_cluster = problems.passes(connection.check_cluster)
    has_root = problems.passes(check_root, settings.root)
    problems.passes(check_ingest_target, settings.root, settings.ingest)
    mask = _check_weights(settings, problems)
    listed: ListedInputs | None = None
    if settings.ingest.photos != "sample" or not problems.texts:  # the sample is drawn when it is listed
        listed = problems.result(_list, settings.root, settings.ingest, inventory)
    planned = {} if listed is None else plan_datasets(settings, listed)
    outdated = [] if listed is None else problems.result(find_outdated, settings, listed) or []
    if not update and outdated:
        which = " (jobs/ingest.py tells which)" if outdated[0] == settings.ingest.dataset else ""
        problems.add(
            f"dataset `{outdated[0]}` in {settings.root} was published from other photos or labels{which}. Add "
            "--update to publish a new version, for which only new photos are processed."
        )
    if mask is not None:
        _check_mask(settings, mask, planned, problems)
    for run in pipeline_runs(settings):
        _check_run(settings, run, planned, problems)
    problems.passes(check_run_photos, settings, outdated)
    machine = None
    if listed is not None:
        if has_root:  # else its free space means nothing
            problems.passes(check_disk, settings, listed)
        if has_cluster and not problems.texts:  # a local cluster takes long to start
            machine = problems.result(_check_machine, settings, listed, planned, problems)
    problems.raise_all()
    assert listed is not None
    rows = describe_plan(settings, listed, planned, machine or this_machine(), outdated)
    print(progress.table(rows, title="plan"))
    return listed


def _list(root: str, settings: IngestSettings, inventory: Inventory) -> ListedInputs:
    """Return the inputs. Raise UserError if they are unusable, or have other splits than the published dataset."""
    listed = list_inputs(root, settings, inventory)
    split.check_shares(dataset.find_dataset(root, settings.dataset), listed.shares)
    return listed


def check_split(settings: Config, manifest: dict[str, Any]) -> None:
    """Raise UserError if a dataset has no photos to evaluate on, which would end the pipeline after training."""
    name = settings.evaluate.split
    if not manifest["splits"].get(name):
        raise UserError(
            f"`evaluate.split` is {name}, but no photo is in {name}. Add labelled photos with this subset, or choose "
            f"another split: --evaluate.split {'val' if name == 'test' else 'test'}."
        )


def check_ingest_target(root: str, settings: IngestSettings) -> None:
    """Raise UserError if the name of the dataset is used by one with other settings."""
    find_version(root, settings.dataset, ingest.identify_settings(settings))


def plan_datasets(settings: Config, listed: ListedInputs) -> Planned:
    """Return the datasets that a pipeline makes, as far as the labels tell."""
    assert settings.ingest is not None
    counts: dict[str, dict[str, int]] = {}
    for label, subset, number in listed.inventory.query(COUNTS):
        held_out = split.count_held_out(number, listed.shares) if subset == "train" else {subset: number}
        counts[label] = dict(Counter(counts.get(label)) + Counter(held_out))
    totals = {name: sum(each.get(name, 0) for each in counts.values()) for name in SPLITS}
    manifest = {
        "classes": sorted(counts),
        "counts": counts,
        "splits": totals,
        "settings": ingest.identify_settings(settings.ingest),
    }
    names, mask = [settings.ingest.dataset], settings.mask
    if mask is not None and mask.source == settings.ingest.dataset and mask.limit is None:
        names.append(mask.dataset)
    planned: Planned = {name: PlannedDataset(dataset.dataset_uri(settings.root, name), manifest) for name in names}
    published = dataset.find_dataset(settings.root, names[0])
    if published is not None and published.manifest.get("listing") == listed.inventory.digest():
        planned[names[0]] = published
    return planned


def find_outdated(settings: Config, listed: ListedInputs) -> list[str]:
    """Return the published datasets of the sections that certainly have other inputs today, in order."""
    assert settings.ingest is not None
    outdated: list[str] = []
    source = dataset.find_dataset(settings.root, settings.ingest.dataset)
    # With as many inputs as before, files may only have been touched: ingestion compares their contents.
    if source is not None and source.manifest["inputs"] != listed.inventory.count_inputs():
        outdated.append(source.name)
    if settings.mask is None or (masked := dataset.find_dataset(settings.root, settings.mask.dataset)) is None:
        return outdated
    source = dataset.find_dataset(settings.root, settings.mask.source)
    if source is not None and (source.name in outdated or source.digest != masked.source_digest):
        outdated.append(masked.name)
    return outdated


def check_run_photos(settings: Config, outdated: list[str]) -> None:
    """Raise UserError if a run exists that was begun on other photos. outdated: datasets to be published anew."""
    root = settings.root
    for run in pipeline_runs(settings):
        source, existing = dataset.find_dataset(root, run.dataset), Run(root, run)
        if source is None or not storage.exists(storage.join(existing.uri, "config.yml")):
            continue
        if run.dataset in outdated or existing.lineage()["dataset_digest"] != source.digest:
            raise UserError(
                f"run `{run.name}` in {root} was begun on an earlier version of dataset `{run.dataset}`. Train another "
                f"run on the new one: --train.name {run.name}-2."
            )


def _check_weights(settings: Config, problems: Problems) -> MaskSettings | None:
    """Fetch and check the weights of all steps, and return the settings of masking, with those of its detector."""
    assert settings.train is not None
    problems.passes(pretrained.check_parent, settings.root, settings.train)
    if settings.mask is None:
        return None
    from carclass.masking.mask import pin_detector  # late: it needs Detectron2

    return problems.result(pin_detector, settings.root, settings.mask) or settings.mask


def _check_mask(settings: Config, mask: MaskSettings, planned: Planned, problems: Problems) -> None:
    """Collect the problems of masking: its source, its true masks, and the name of its dataset."""
    from carclass.masking.mask import check_target  # late: it needs Detectron2

    assert settings.ingest is not None
    source = _find(settings.root, mask.source, planned, problems)
    if source is not None and mask.detector.weights_sha256 is not None:  # else the weights are unusable
        problems.passes(check_target, settings.root, mask, source)
    if source is None and mask.source != settings.ingest.dataset:
        problems.add(_unknown_dataset("mask.source", mask.source, [settings.ingest.dataset]))
    if mask.truth not in (None, "sample") and not storage.exists(mask.truth):
        problems.add(f"`mask.truth`: there is no file {mask.truth}. Correct the path, or leave it out.")


def _find(root: str, name: str, planned: Planned, problems: Problems) -> Dataset | None:
    """Return a dataset that is to be made or updated, or else a published one, or None."""
    return planned.get(name) or problems.result(dataset.find_dataset, root, name)


def _unknown_dataset(key: str, name: str, made: list[str]) -> str:
    advice = ", or add the section `mask: {}`" if key == "train.dataset" and len(made) == 1 else ""
    return f"`{key}` is {name}, which no section makes and which is not published. Set it to {made[-1]}{advice}."


def _check_run(settings: Config, run: TrainSettings, planned: Planned, problems: Problems) -> None:
    """Collect the problems of a run: its name, its dataset, the split to evaluate on, and its weights."""
    assert settings.ingest is not None
    root, made = settings.root, [settings.ingest.dataset, *([settings.mask.dataset] if settings.mask else [])]
    problems.passes(check_loggers, root, run)
    problems.passes(check_same_settings, Run(root, run))
    source = _find(root, run.dataset, planned, problems)
    if source is None:
        if run.dataset not in made:
            problems.add(_unknown_dataset("train.dataset", run.dataset, made))
        return
    problems.passes(preflight.check_splits, source)
    problems.passes(check_split, settings, source.manifest)
    problems.passes(check_parent_classes, root, run, source)


def check_parent_classes(root: str, run: TrainSettings, source: Dataset) -> None:
    """Raise UserError if a run starts from one with other classes than its dataset.

    A class that only a planned dataset has is warned about: all of its photos may be unusable.
    """
    if (classes := pretrained.parent_classes(root, run)) is None:
        return
    lost, added = (sorted(set(a).difference(b)) for a, b in ((classes, source.classes), (source.classes, classes)))
    if lost or (added and not isinstance(source, PlannedDataset)):
        raise UserError(
            f"`train.parent`: {run.parent} and the dataset `{source.name}` have different classes, such as "
            f"{(lost or added)[0]}. Start from a run with the same classes, or from `imagenet`."
        )
    if added:
        log.warning("train: %s lacks the class %s: it has to have all classes of the dataset", run.parent, added[0])


def check_disk(settings: Config, listed: ListedInputs) -> None:
    """Raise UserError if a local root has less space than the datasets take at least."""
    if (path := storage.local_path(settings.root)) is None or settings.ingest is None:
        return
    small = "SELECT sum(min(size, ?)) FROM input WHERE label NOT NULL AND reason IS NULL"
    ((size,),) = listed.inventory.query(small, SMALL_PHOTO_BYTES)
    missing = _missing_datasets(settings)
    folders = [Path(path, "datasets", name) for name in missing]
    written = sum(file.stat().st_size for folder in folders for file in folder.rglob("*.parquet"))
    existing = next(folder for folder in (Path(path), *Path(path).parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if (required := (size or 0) * len(missing)) > written + free:
        raise UserError(
            f"`root`: {settings.root} has {bytes_text(free)} free, and the dataset(s) {' and '.join(missing)} need at "
            f"least {bytes_text(required)}. Free some, or choose another root."
        )


def _missing_datasets(settings: Config) -> list[str]:
    """Return the datasets of the sections that are not published."""
    sections = [section for section in (settings.ingest, settings.mask) if section is not None]
    return [each.dataset for each in sections if dataset.find_dataset(settings.root, each.dataset) is None]


def _unfinished_runs(settings: Config) -> list[TrainSettings]:
    return [run for run in pipeline_runs(settings) if Run(settings.root, run).unfinished_stages]


def _check_machine(settings: Config, listed: ListedInputs, planned: Planned, problems: Problems) -> Machine:
    """Collect the problems of devices and memory, and return the resources of the cluster.

    A finished run needs no cluster.
    """
    folders = {"root": settings.root, "ingest.photos": archive.split_folder(listed.settings.photos)[0]}
    if not _unfinished_runs(settings) or not problems.passes(connection.connect, folders):
        return this_machine()
    gpus, memory = resources.count_slots("GPU", 1), resources.memory_bytes(use_gpu=False)
    cpus, node_cpus = max(1, resources.count_slots("CPU", 1)), resources.cpus_per_worker(1)
    running = Machine(cpus, memory or 0, (0,) * gpus, node_cpus=node_cpus)
    if resources.is_labelled():
        return _autoscaled(running, settings)
    _check_devices(settings, planned, problems)
    return running


def _autoscaled(running: Machine, settings: Config) -> Machine:
    """Return the resources of a cluster whose nodes are started when they are needed.

    They are the GPUs that jobs will wait for, and the CPUs and memory of all nodes without GPUs, if they are known.
    """
    gpus = (0,) * max(len(running.gpus), _awaited_gpus(settings))
    largest = autoscaler.largest_size()
    if largest is None:
        return running._replace(gpus=gpus, note="CPUs and memory of the nodes that run now; more are started on demand")
    cpus, node_cpus = int(largest.get("CPU", 0)) or running.cpus, autoscaler.largest_node_cpus() or running.node_cpus
    note = f"CPUs and memory of all nodes without GPUs that may be started, of up to {node_cpus} CPUs each"
    return Machine(cpus, int(largest.get("memory", 0)), gpus, note, node_cpus)


def _awaited_gpus(settings: Config) -> int:
    """Return the number of GPUs that masking or training will wait for on a cluster with an autoscaler."""
    counts = [run.workers[0] for run in _unfinished_runs(settings) if run.use_gpu is not False]
    if settings.mask is not None and settings.mask.use_gpu is not False:
        counts.append(settings.mask.num_actors or 1)
    return max(counts, default=0)


def _check_devices(settings: Config, planned: Planned, problems: Problems) -> None:
    """Collect the problems of masking and training with the cluster's devices and memory."""
    if settings.mask is not None and settings.mask.dataset in _missing_datasets(settings):
        from carclass.masking import mask  # late: it needs Detectron2

        problems.passes(mask.plan_detectors, settings.mask)
    for run in _unfinished_runs(settings):
        source = _find(settings.root, run.dataset, planned, problems)
        if source is not None:
            problems.passes(train.check_resources, settings.root, run, source)


def describe_plan(
    settings: Config, listed: ListedInputs, planned: Planned, machine: Machine, outdated: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Return the steps that are left with their photos and estimated time, and what was assumed."""
    assert settings.ingest is not None
    size = "SELECT avg(min(size, ?)), avg(size) FROM input WHERE label NOT NULL AND reason IS NULL"
    ((stored, read),) = listed.inventory.query(size, estimate.PHOTO_BYTES)
    splits = planned[settings.ingest.dataset].manifest["splits"]
    photos = estimate.Photos(splits, int(stored or 0), estimate.ingest_seconds(read or 0))
    missing, unfinished = _missing_datasets(settings), _unfinished_runs(settings)
    published = [each.dataset for each in (settings.ingest, settings.mask) if each and each.dataset not in missing]
    trained = [run.name for run in pipeline_runs(settings) if run not in unfinished]
    done = [
        ("published", ", ".join(name for name in published if name not in outdated)),
        ("published anew", f"{', '.join(outdated)}: only new photos are processed" if outdated else ""),
        ("trained", ", ".join(trained)),
    ]
    steps = estimate.plan_steps(settings, photos, machine, published=published, trained=trained)
    rows = [*(row for row in done if row[1]), *estimate.describe_steps(steps)]
    counts = ", ".join(f"{splits.get(name, 0):,} {name}" for name in SPLITS)
    return [("photos", counts), *rows, ("assumed", f"all photos are usable; {machine.text}; {estimate.BASIS}")]
