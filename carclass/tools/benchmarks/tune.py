"""Benchmark of pruning: a sweep with ASHA against the same trials without pruning.

The search `both.yml` runs on the masked sample with random sampling, so that both sweeps have the same trials. Compute
is the device time of all epochs, without the baseline trial, which is never pruned.
"""

import time
from pathlib import Path

from carclass.config import cli
from carclass.config.schema import Config
from carclass.config.search import Search
from carclass.errors import UserError
from carclass.ingestion.ingest import ingest_photos
from carclass.masking.mask import mask_dataset
from carclass.progress import print_line
from carclass.tuning import results, search_space
from carclass.tuning.collect import collect_sweep
from carclass.tuning.tune import run_sweep

SEARCH = Path("experiments", "searches", "both.yml")
"""Path in the folder of the jobs."""


def run(photos: Path | None, weights: Path | None, folder: Path, jobs: Path) -> dict[str, float]:
    """Measure and return the figures. jobs: folder of the jobs. Raise UserError for photos or weights."""
    if photos is not None or weights is not None:
        raise UserError(
            "--photos and --weights have no effect on the benchmark `tune`, which uses the sample. Omit them."
        )
    root = str(folder / "root")
    settings = cli.load_config(jobs / "experiments" / "sample.yml", {"root": root}, Config)
    assert settings.ingest is not None
    assert settings.mask is not None
    ingest_photos(root, settings.ingest)
    mask_dataset(root, settings.mask)
    figures: dict[str, float] = {}
    for scheduler in ("asha", "none"):
        started = time.monotonic()
        sweep = run_search(root, scheduler, jobs / SEARCH)
        trials = [result for result in sweep.searched if result.trial.number > 0]
        figures |= {
            f"{scheduler}_trials": len(trials),
            f"{scheduler}_epochs": sum(len(result.epochs) for result in trials),
            f"{scheduler}_device_seconds": sum(result.device_seconds for result in trials),
            f"{scheduler}_seconds": time.monotonic() - started,
            f"{scheduler}_best": max(result.accuracy for result in trials if result.trial.state == "complete"),
        }
        print_line(f"{scheduler}: {len(trials)} trials in {figures[f'{scheduler}_seconds']:.0f} s")
    return figures | {
        "compute_none_vs_asha": figures["none_device_seconds"] / figures["asha_device_seconds"],
        "epochs_none_vs_asha": figures["none_epochs"] / figures["asha_epochs"],
        "seconds_none_vs_asha": figures["none_seconds"] / figures["asha_seconds"],
        "best_difference": figures["none_best"] - figures["asha_best"],
    }


def run_search(root: str, scheduler: str, file: Path) -> results.SweepResult:
    """Run the search with a scheduler and return its result."""
    overrides = {"root": root, "name": scheduler, "scheduler": scheduler, "sampler": "random", "num_seeds": "1"}
    run_sweep(search_space.load_space(file, cli.load_config(file, overrides, Search)))
    return collect_sweep(root, scheduler)
