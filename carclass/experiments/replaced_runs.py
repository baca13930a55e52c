"""Runs that are moved aside whole, to be trained again: `<root>/replaced/<run>/<start of the run>-<hash>/`.

Nothing deletes them. A folder of them is a run: it is loaded, and moved back to `<root>/experiments/<run>`, as it is.
"""

from carclass import storage
from carclass.errors import UserError
from carclass.runs.run import STAGES, Run

OF_A_RUN = (
    *(f"{folder}/" for folder in (*STAGES, "steps", "tensorboard", "predictions")), "export", "report", "config.yml",
    "lineage.json", "metrics.jsonl", "model.json", "preprocessing.json", "calibration.json", "summary.json",
)  # fmt: skip
"""Beginnings of the paths of a run's files; any other file in its folder is the user's."""
LAST = ("config.yml", "lineage.json")
"""Files that are moved last: without the first there is no run, and the hash of the second names the target."""
LARGE = (".safetensors", ".onnx", ".pt2")
"""Endings of files that are moved one by one, as each is read whole."""


def set_aside_run(run: Run) -> str:
    """Move a run's files to its folder of replaced runs, and return that. Repeated after a kill, it is completed."""
    paths = [path for path in storage.list_files(run.uri) if path.startswith(OF_A_RUN)]
    last = [path for path in LAST if path in paths]
    target = _target(run, last[-1])
    for path in last:
        _copy(run, path, target)
    others = [path for path in paths if path not in last]
    for path in others:
        if path.endswith(LARGE):
            _move(run, path, target)
    small = [path for path in others if not path.endswith(LARGE)]
    list(storage.in_parallel(lambda path: _move(run, path, target), small))
    for path in last:
        storage.delete(storage.join(run.uri, path))
    return target


def is_half_moved(run: Run) -> bool:
    """Return True if set_aside_run was interrupted."""
    last = [path for path in LAST if storage.exists(storage.join(run.uri, path))]
    return bool(last) and storage.exists(storage.join(_target(run, last[-1]), last[-1]))


def names_of_replaced_runs(root: str) -> set[str]:
    """Return the names of all runs of which one was moved aside."""
    return {path.split("/")[0] for path in storage.list_files(storage.join(root, "replaced"))}


def _target(run: Run, file: str) -> str:
    """Return the folder for a run, which is the same in every attempt. file: of LAST, hashed."""
    content = storage.read_bytes(storage.join(run.uri, file))
    try:
        started = run.lineage()["started"].replace(":", "")
    except UserError:  # damaged
        started = "unknown"
    return storage.join(run.root, "replaced", run.settings.name, f"{started}-{storage.sha256(content)[:8]}")


def _move(run: Run, path: str, target: str) -> None:
    _copy(run, path, target)
    storage.delete(storage.join(run.uri, path))


def _copy(run: Run, path: str, target: str) -> None:
    storage.write_bytes(storage.join(target, path), storage.read_bytes(storage.join(run.uri, path)))
