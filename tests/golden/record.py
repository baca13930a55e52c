"""Golden values of the job chain, read from the files that the jobs write.

    .venv/bin/python -m tests.golden.record

runs the chain (about two minutes on two cores) and writes golden.json anew. Record only a change of behaviour that is
wanted, and read the diff of golden.json before committing it.
"""

import hashlib
import json
import platform
import re
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file

from tests.golden.jobs import EXPERIMENTS, RUN, SWEEP, run_chain

GOLDEN = Path(__file__).with_name("golden.json")
Row = dict[str, Any]
COUNTS = ("kind", "inputs", "rows", "quarantined", "reasons", "splits", "outcomes")
WITH_PATHS = ("photos", "labels", "source_digest")
"""Settings of a dataset that differ from folder to folder."""
ROW_COLUMNS = ("image_id", "key", "label", "split", "width", "height", "image")
MASK_COLUMNS = ("key", "outcome", "vehicle_class", "box", "mask", "image")
STAGES = [(RUN, "frozen"), (RUN, "unfrozen")]
STAGES += [(str(one["name"]), stage) for one in EXPERIMENTS for stage in ("frozen", "unfrozen") if one[stage]]
"""(run, stage) of all that is trained, without the sweep's trials."""
EXPERIMENT_LINE = re.compile(
    r"^(?P<indent>[ │├└─]*)(?P<name>\w+): .*val (?P<accuracy>[\d.]+) \((\w+ )?epoch (?P<epoch>\d+)\)"
)


def main() -> None:
    """Write golden.json."""
    with tempfile.TemporaryDirectory() as folder:
        values = collect(*run_chain(Path(folder)))
    GOLDEN.write_text(format_json(values))
    print(f"recorded {GOLDEN}")


def collect(root: Path, tree: str) -> Row:
    """Return all golden values: by job, plain numbers, strings, lists and mappings. tree: as printed."""
    return {
        "platform": describe_platform(),
        "ingest": {**read_manifest(root, "v1"), "rows": hash_rows(root, "v1", ROW_COLUMNS)},
        "mask": {
            **read_manifest(root, "v2"),
            "rows": hash_rows(root, "v2", MASK_COLUMNS),
            "scores": [round_score(row["score"]) for row in read_rows(root, "v2", ["key", "score"])],
        },
        "runs": {f"{run}/{stage}": read_stage(root / "experiments" / run, stage) for run, stage in STAGES},
        "evaluate": read_evaluation(root / "experiments" / RUN / "report"),
        "tune": read_trials(root / "sweeps" / SWEEP / "trials.parquet"),
        "lineage": parse_tree(tree),
    }


def format_json(values: Row) -> str:
    """Return JSON with each list of numbers or strings on one line; floats as `repr` has them, so to the bit."""
    text = json.dumps(values, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def describe_platform() -> dict[str, str]:
    """Return what values are reproducible to the bit on: the machine's kind and the versions of what computes."""
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "pillow")}
    return {"machine": platform.machine(), "processor": describe_processor(), **versions}


def describe_processor() -> str:
    """Return the maker of the CPU and its widest instructions: PyTorch's libraries choose their kernels by both."""
    info = Path("/proc/cpuinfo")
    maker = re.search(r"vendor_id\s*: (\S+)", info.read_text()) if info.exists() else None
    return f"{maker[1] if maker else platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def read_manifest(root: Path, dataset: str) -> Row:
    """Return counts, classes and settings of a dataset; no times, no paths, no hashes of either."""
    manifest = json.loads((root / "datasets" / dataset / "manifest.json").read_text())
    quarantine = [[row["key"], row["reason"]] for row in read_rows(root, dataset, ["key", "reason"], "quarantine")]
    counts = {name: manifest[name] for name in COUNTS if name in manifest}
    settings = {name: value for name, value in manifest["settings"].items() if name not in WITH_PATHS}
    return {"counts": counts, "classes": manifest["classes"], "settings": settings, "quarantine": quarantine}


def read_rows(root: Path, dataset: str, columns: Iterable[str], folder: str = "parts") -> list[Row]:
    """Return columns of a dataset's rows, in the order of their keys."""
    parts = sorted((root / "datasets" / dataset / folder).glob("*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part, columns=[*columns]).to_pylist()]
    return sorted(rows, key=lambda row: row["key"])


def hash_rows(root: Path, dataset: str, columns: Iterable[str]) -> dict[str, str]:
    """Return the sha256 over each column of all rows, in the order of their keys."""
    rows = read_rows(root, dataset, columns)
    return {name: hash_lines(f"{row['key']} {as_text(row[name])}" for row in rows) for name in columns}


def as_text(value: Any) -> str:
    """Return a cell as text: bytes by their sha256, everything else as Python writes it."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


def hash_lines(lines: Iterable[str]) -> str:
    """Return the sha256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def round_score(score: float | None) -> float | None:
    """Return a detector's score to 4 decimals; None where there is none."""
    return None if score is None else round(score, 4)


def read_stage(run: Path, stage: str) -> Row:
    """Return the losses, accuracies and weights of a stage of a run."""
    epochs = [row for row in read_lines(run / "metrics.jsonl") if row["stage"] == stage]
    steps = [row for path in sorted((run / "steps" / stage).glob("*.jsonl")) for row in read_lines(path)]
    return {
        "step_losses": [row["loss"] for row in steps],
        "step_learning_rates": [row["lr"] for row in steps],
        "val_losses": [row["val_loss"] for row in epochs],
        "val_accuracies": [row["val_accuracy"] for row in epochs],
        "weights_sha256": hash_tensors(run / stage / "best.safetensors"),
    }


def read_lines(path: Path) -> list[Row]:
    """Return the rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def hash_tensors(path: Path) -> str:
    """Return the sha256 over names, dtypes, shapes and values of all tensors of a safetensors file."""
    tensors = sorted(load_file(path).items())
    lines = (f"{name} {a.dtype} {a.shape} {hashlib.sha256(a.tobytes()).hexdigest()}" for name, a in tensors)
    return hash_lines(lines)


def read_evaluation(report: Path) -> Row:
    """Return the test accuracies of a run and the sha256 over its predictions."""
    metrics = json.loads((report / "metrics.json").read_text())
    rows = pq.read_table(report / "predictions.parquet", columns=["key", "label", "predicted"]).to_pylist()
    lines = (f"{row['key']} {row['label']} {row['predicted']}" for row in sorted(rows, key=lambda row: row["key"]))
    accuracies = {name: metrics[name] for name in ("accuracy", "top5_accuracy")}
    return {"photos": len(rows), **accuracies, "predictions_sha256": hash_lines(lines)}


def read_trials(table: Path) -> list[Row]:
    """Return each trial's state, settings and best val accuracy."""
    rows = sorted(pq.read_table(table).to_pylist(), key=lambda row: row["number"])
    settings = [name for name in rows[0] if name.startswith("train.")]
    return [{name: row[name] for name in ("number", "state", "seed", *settings, "accuracy")} for row in rows]


def parse_tree(printed: str) -> list[Row]:
    """Return name, parent and best val accuracy of each experiment of a printed tree, from top to bottom."""
    found: list[Row] = []
    above: dict[int, str] = {}
    for match in filter(None, map(EXPERIMENT_LINE.match, printed.splitlines())):
        depth = len(match["indent"]) // 4
        above[depth] = match["name"]
        accuracy, epoch = float(match["accuracy"]), int(match["epoch"])
        found.append({"name": match["name"], "parent": above.get(depth - 1), "accuracy": accuracy, "epoch": epoch})
    return found


if __name__ == "__main__":
    main()
