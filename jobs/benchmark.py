"""Benchmarks: ratios measured in one run on this machine, carclass against the plain way.

  python jobs/benchmark.py ingest
  python jobs/benchmark.py ingest --photos DIR --json FILE
  python jobs/benchmark.py masking --photos DIR --weights DIR
  python jobs/benchmark.py masking --photos DIR --weights DIR --in-process
  python jobs/benchmark.py memory
  python jobs/benchmark.py frozen --photos DIR --weights DIR
  python jobs/benchmark.py train --photos DIR --weights DIR
  python jobs/benchmark.py train --photos DIR --weights DIR --in-process
  python jobs/benchmark.py workers --photos DIR --weights DIR
  python jobs/benchmark.py epochs --photos DIR --weights DIR
  python jobs/benchmark.py tune
  python jobs/benchmark.py predict --photos DIR --weights DIR
  python jobs/benchmark.py scale
  python jobs/benchmark.py nodes
  python jobs/benchmark.py rows
  python jobs/benchmark.py parts
  python jobs/benchmark.py gpu --photos DIR --weights DIR

ingest   photos into a published dataset, against a PIL loop on one core
masking  the pool of detectors, exact and fast, against DefaultPredictor in a plain loop and in map_batches
memory   peak memory of ingest and masking over 500, 1,000 and 2,000 drawn phone photos of 12 megapixels
frozen   the frozen stage on cached features, against a loop that runs the backbone in every epoch
train    the unfrozen stage, against a script with DataLoader, ImageFolder and DDP
workers  steps by several workers of Ray Train with DDP, against one
epochs   per-epoch overhead
tune     a sweep of 16 trials on the drawn sample with pruning, against the same trials without
predict  jobs/predict.py on new photos, masked and not, against both networks on one photo at a time
scale    keys listed and ingested from an S3 server, 10,000 to a million: rates and peak memory
nodes    a head with 1,000 registered nodes that run no code: seconds of scheduling, memory of the head
rows     what drivers do over the rows of a dataset: seconds and peak memory
parts    what drivers do for each part of a dataset, of 15,000 to 1.5 million parts: seconds and peak memory
gpu      one GPU in ten minutes: training against timm (of the development packages) and a plain script, and masking
"""

import importlib
import json
import logging
import tempfile
from pathlib import Path

from carclass import progress
from carclass.config import cli
from carclass.errors import UserError
from carclass.formatting import number_text

NAMES = (
    "epochs", "frozen", "gpu", "ingest", "masking", "memory", "nodes", "parts", "predict", "rows", "scale", "train",
    "tune", "workers",
)  # fmt: skip
IN_PROCESS = {"epochs": "epochs", "frozen": "frozen", "masking": "masking_in_process", "train": "train_in_process"}
"""Modules of benchmarks with --in-process."""
READS_JOBS = ("memory", "scale", "tune")
"""Benchmarks that run jobs or read their experiment files."""


def main() -> None:
    logging.getLogger("carclass").setLevel(logging.WARNING)
    parser = cli.JobParser(__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--photos", type=Path, metavar="DIR", help="folder of photos; by default the drawn sample")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder of weights, for benchmarks of networks")
    parser.add_argument("--in-process", action="store_true", help="computation only, without Ray")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a flat JSON file")
    args = parser.parse()
    if args.in_process and args.name not in IN_PROCESS:
        raise UserError(f"--in-process: the benchmark `{args.name}` measures Ray itself. Omit the option.")
    name = IN_PROCESS[args.name] if args.in_process else args.name
    module = importlib.import_module(f"carclass.tools.benchmarks.{name}")  # late: it takes seconds
    inputs = {"jobs": Path(__file__).parent} if name in READS_JOBS else {}
    with tempfile.TemporaryDirectory() as folder:
        figures = module.run(args.photos, args.weights, Path(folder), **inputs)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1, allow_nan=False))
    rows = [(key.replace("_", " "), number_text(value)) for key, value in figures.items()]
    print(progress.table(rows, title=f"benchmark: {args.name}"))


if __name__ == "__main__":
    cli.main(main)
