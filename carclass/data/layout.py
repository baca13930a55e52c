"""Names of the files and folders that jobs write below their targets, and a check for files in place of folders."""

import os
from pathlib import Path

from carclass import storage
from carclass.errors import UserError

FOLDERS = frozenset((
    "export", "frozen", "parts", "predictions", "quarantine", "report", "steps", "tensorboard", "thumbnails",
    "trials", "tune", "unfrozen",
))  # fmt: skip
FILES = frozenset((
    "analysis.html", "best.json", "best.safetensors", "best.yml", "calibration.json", "checkpoint.json", "config.yml",
    "contact_sheet.jpg", "diverged.json", "draft.json", "export.json", "lease.json", "lineage.json", "manifest.json",
    "metrics.json", "metrics.jsonl", "model.json", "model.onnx", "model.pt2", "model.safetensors",
    "optimizer.safetensors", "predictions.csv", "predictions.html", "predictions.parquet", "preprocessing.json",
    "report.html", "search.yml", "settings.json", "summary.json", "trials.json", "trials.parquet",
    "weights.safetensors",
))  # fmt: skip


def check_layout(uri: str) -> None:
    """Check that no file is where jobs expect a folder, or the reverse, above or below a local target.

    Raise UserError with the first such path. On S3 both may exist side by side.
    """
    if (path := storage.local_path(uri)) is None:
        return
    target = Path(path)
    above = next(folder for folder in (target, *target.parents) if os.path.lexists(folder))
    if not above.is_dir():
        raise _misplaced(above, "a folder")
    for folder, folders, files in os.walk(target):
        for name in sorted(FOLDERS.intersection(files)):
            raise _misplaced(Path(folder, name), "a folder")
        if folder != str(target / "predictions"):  # whose folders have names given by users
            for name in sorted(FILES.intersection(folders)):
                raise _misplaced(Path(folder, name), "a file")
        for name in sorted(FILES.intersection(files)):
            if not os.path.exists(Path(folder, name)):  # a link without a target
                raise _misplaced(Path(folder, name), "a file")


def _misplaced(path: Path, expected: str) -> UserError:
    found = "a folder" if path.is_dir() else "a broken link" if path.is_symlink() else "a file"
    return UserError(f"{path} is {found}, but jobs write {expected} there. Move it, and run the same command again.")
