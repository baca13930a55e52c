"""Settings of a small job chain, with enough parts and checkpoints to interrupt it."""

from typing import Any

RUN = "run"
UNFROZEN_EPOCHS = 6


def chain_settings(root: str, source: str) -> dict[str, Any]:
    """Return the settings of jobs/pipeline.py.

    Args:
        root: URI of the results.
        source: URI of a folder with photos/ and labels.csv, as written by carclass.sample.generate.
    """
    detector = {"model": "sample", "weights": "sample", "short_side": 160, "num_proposals": 30}
    return {
        "root": root,
        "ingest": {"photos": f"{source}/photos", "labels": f"{source}/labels.csv"},
        "mask": {"detector": detector, "part_rows": 8},
        "train": {
            "name": RUN,
            "parent": "sample",
            "model": {"architecture": "resnet26-narrow", "image_size": 64},
            "frozen": {"epochs": 2},
            "unfrozen": {"epochs": UNFROZEN_EPOCHS, "lr": 1e-3, "batch_size": 16},
            "precision": "fp32",
            "num_workers": 2,
            "checkpoint_seconds": 0,
        },
    }
