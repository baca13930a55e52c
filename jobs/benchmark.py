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

BENCHMARKS = {"ingest": ingest.run}


def main() -> None:
    """Runs the job."""
    logging.getLogger("carclass").setLevel(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--photos", type=Path, metavar="DIR", help="folder of photos; without it, the drawn sample")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as flat JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = BENCHMARKS[given.name](given.photos, Path(folder))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))
    rows = [(name.replace("_", " "), f"{value:,.2f}") for name, value in figures.items()]
    print(progress.table(rows, title=f"benchmark: {given.name}"))


if __name__ == "__main__":
    command_line.main(main)
