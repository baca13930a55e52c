"""Every speed claim, as a ratio measured in one run: ours and the plain way, side by side on this machine.

  python jobs/benchmark.py ingest
  python jobs/benchmark.py ingest --photos DIR --json FILE

ingest   photos into a published dataset through Ray Data, against a PIL loop on one core
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path

from carclass import command_line, progress
from carclass.benchmarks import ingest
from carclass.errors import UserError

BENCHMARKS = {"ingest": ingest.run}
NEED_WEIGHTS: set[str] = set()


def main() -> None:
    """Runs the job."""
    logging.getLogger("carclass").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--photos", type=Path, metavar="DIR", help="folder of photos; without it, the drawn sample")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder of weights, for benchmarks of networks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as flat JSON")
    given = parser.parse_args()
    if given.weights is not None and given.name not in NEED_WEIGHTS:
        raise UserError(
            f"--weights has no effect on the benchmark `{given.name}`, which runs no network. Leave it out."
        )
    with tempfile.TemporaryDirectory() as folder:
        figures = BENCHMARKS[given.name](given.photos, Path(folder))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))
    rows = [(name.replace("_", " "), command_line.number(value)) for name, value in figures.items()]
    print(progress.table(rows, title=f"benchmark: {given.name}"))


if __name__ == "__main__":
    command_line.main(main)
