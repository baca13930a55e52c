"""Every speed claim, as a ratio measured in one run: ours and the plain way, side by side on this machine.

  python jobs/benchmark.py ingest
  python jobs/benchmark.py ingest --photos DIR --json FILE
  python jobs/benchmark.py masking --photos DIR --weights DIR
  python jobs/benchmark.py masking --photos DIR --weights DIR --in-process
  python jobs/benchmark.py memory
  python jobs/benchmark.py frozen --photos DIR --weights DIR
  python jobs/benchmark.py train --photos DIR --weights DIR
  python jobs/benchmark.py train --photos DIR --weights DIR --in-process
  python jobs/benchmark.py epochs --photos DIR --weights DIR
  python jobs/benchmark.py tune
  python jobs/benchmark.py predict --photos DIR --weights DIR
  python jobs/benchmark.py scale

ingest   photos into a published dataset through Ray Data, against a PIL loop on one core
masking  the pool of detectors, exact and fast, against DefaultPredictor: a plain loop, and in map_batches
memory   peak memory of a masking job over 1,000, 4,000 and 16,000 photos of the drawn sample
frozen   the frozen stage on cached features, against a loop that runs the backbone in every epoch
train    the unfrozen stage, against a script with DataLoader, ImageFolder and DDP
epochs   what an epoch costs beyond its arithmetic
tune     a sweep of 16 settings of the drawn sample with pruning, against the same ones without
predict  jobs/predict.py on new photos, masked and not, against both networks on one photo at a time
scale    keys listed and ingested from an S3 server, 10,000 to a million: rates and peak memory
"""

import argparse
import importlib
import json
import logging
import tempfile
from pathlib import Path

from carclass import progress
from carclass.config import cli
from carclass.errors import UserError
from carclass.formatting import number_text

MODULES = {("ingest", False): "ingest", ("masking", False): "masking", ("masking", True): "masking_in_process"}
MODULES |= {("memory", False): "memory", ("frozen", False): "frozen", ("frozen", True): "frozen"}
MODULES |= {("train", False): "train", ("train", True): "train_in_process"}
MODULES |= {("epochs", False): "epochs", ("epochs", True): "epochs", ("tune", False): "tune"}
MODULES |= {("predict", False): "predict", ("scale", False): "scale"}


def main() -> None:
    """Runs the job."""
    logging.getLogger("carclass").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted({name for name, _ in MODULES}))
    parser.add_argument("--photos", type=Path, metavar="DIR", help="folder of photos; without it, the drawn sample")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder of weights, for benchmarks of networks")
    parser.add_argument("--in-process", action="store_true", help="the compute alone, without Ray")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as flat JSON")
    given = parser.parse_args()
    if (given.name, given.in_process) not in MODULES:
        raise UserError(f"--in-process: the benchmark `{given.name}` is of Ray's part. Leave it out.")
    # Imported here, so that what runs without Ray doesn't import it.
    module = importlib.import_module(f"carclass.tools.benchmarks.{MODULES[given.name, given.in_process]}")
    with tempfile.TemporaryDirectory() as folder:
        figures = module.run(given.photos, given.weights, Path(folder))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))
    rows = [(name.replace("_", " "), number_text(value)) for name, value in figures.items()]
    print(progress.table(rows, title=f"benchmark: {given.name}"))


if __name__ == "__main__":
    cli.main(main)
