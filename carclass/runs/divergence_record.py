"""Record of a stage that ended as its loss or weights were not finite, kept as `<stage>/diverged.json`.

It is there until the stage is trained to its end.
"""

from carclass import storage
from carclass.data import formats
from carclass.runs.run import Run

FILE = "diverged.json"


def record_divergence(run: Run, stage: str, epoch: int, step: int, quantity: str) -> None:
    """Write the record of a stage. step: of the epoch, from 1. quantity: the first that was not finite."""
    facts = {"stage": stage, "epoch": epoch, "step": step, "quantity": quantity}
    formats.write(storage.join(run.uri, stage, FILE), "divergence", facts)


def remove_divergence(run: Run, stage: str) -> None:
    """Delete the record of a stage that is trained to its end, if there is one."""
    uri = storage.join(run.uri, stage, FILE)
    if storage.exists(uri):
        storage.delete(uri)


def divergence_text(run: Run) -> str | None:
    """Return in words where an unfinished run diverged: "frozen epoch 3, step 7: loss not finite"; None if it did not.

    Raise UserError if the record is damaged.
    """
    for stage in run.unfinished_stages:
        try:
            facts = formats.read(storage.join(run.uri, stage, FILE), "divergence")
        except FileNotFoundError:
            continue
        return f"{stage} epoch {facts['epoch']}, step {facts['step']}: {facts['quantity']} not finite"
    return None
