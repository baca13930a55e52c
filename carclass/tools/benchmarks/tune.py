"""What pruning saves: the same settings tried twice, ended early by ASHA where they promise little, and all in full.

On the drawn sample with its background removed, by `both.yml`, whose settings are drawn by chance so that both sweeps
try the same ones. Compute is the time of epochs on all devices; the experiment as it stands, which is always trained in
full, is left out of it.
"""

import time
from pathlib import Path

from carclass.config import cli
from carclass.config.schema import Config
from carclass.errors import UserError
from carclass.ingestion.ingest import ingest_photos
from carclass.masking.mask import mask_dataset
from carclass.progress import say
from carclass.tuning import results, search_space
from carclass.tuning.collect import collect_sweep
from carclass.tuning.tune import run_sweep

SEARCH = Path(__file__).parents[2] / "jobs" / "experiments" / "searches" / "both.yml"


def run(photos: Path | None, weights: Path | None, folder: Path) -> dict[str, float]:
    """Figures of one comparison. UserError when photos or weights are given, which it doesn't use."""
    if photos is not None or weights is not None:
        raise UserError("--photos and --weights have no effect on the benchmark `tune`, which is on the sample.")
    root = str(folder / "root")
    settings = cli.load_config(cli.sample_config(), {"root": root}, Config)
    assert settings.ingest is not None
    assert settings.mask is not None
    ingest_photos(root, settings.ingest)
    mask_dataset(root, settings.mask)
    figures: dict[str, float] = {}
    for scheduler in ("asha", "none"):
        started = time.monotonic()
        found = swept(root, scheduler)
        tried = [one for one in found.searched if one.trial.number > 0]
        figures |= {
            f"{scheduler}_trials": len(tried),
            f"{scheduler}_epochs": sum(len(one.epochs) for one in tried),
            f"{scheduler}_device_seconds": sum(one.device_seconds for one in tried),
            f"{scheduler}_seconds": time.monotonic() - started,
            f"{scheduler}_best": max(one.accuracy for one in tried if one.trial.state == "complete"),
        }
        say(f"{scheduler}: {len(tried)} trials in {figures[f'{scheduler}_seconds']:.0f} s")
    return figures | {
        "compute_none_vs_asha": figures["none_device_seconds"] / figures["asha_device_seconds"],
        "epochs_none_vs_asha": figures["none_epochs"] / figures["asha_epochs"],
        "seconds_none_vs_asha": figures["none_seconds"] / figures["asha_seconds"],
        "best_difference": figures["none_best"] - figures["asha_best"],
    }


def swept(root: str, scheduler: str) -> results.SweepResult:
    """The sweep with a scheduler."""
    given = {"root": root, "name": scheduler, "scheduler": scheduler, "sampler": "random", "num_seeds": "1"}
    found = search_space.load_space(SEARCH, cli.load_config(SEARCH, given, search_space.Search))
    run_sweep(found)
    return collect_sweep(root, scheduler)
