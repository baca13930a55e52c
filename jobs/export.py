"""A run → its best network for other programs: safetensors, ONNX and torch.export, in `<run>/export/`.

  python jobs/export.py --run NAME --config FILE
  python jobs/export.py --run NAME --root s3://bucket/carclass

model.onnx and model.pt2 take uint8 (N,3,S,S) RGB photos, S pixels wide and high, and give (N,C) logits: normalisation
is inside. Labels and preprocessing are in the metadata of each file. A file that disagrees with the network on photos
of the run's dataset is not published. Needs no cluster and no GPU.
"""

import argparse
from pathlib import Path

from carclass import progress, storage
from carclass.config import cli
from carclass.config.schema import Config
from carclass.runs.export import FORMATS, export_run


def main() -> None:
    """Runs the job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", required=True, metavar="NAME", help="run to export")
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file whose `root` holds the run [the sample's]"
    )
    place.add_argument("--root", metavar="URI", help="the root itself: a folder or s3:// prefix")
    given = parser.parse_args()
    overrides = {"root": given.root} if given.root else {}
    root = cli.load_config(given.config or cli.sample_config(), overrides, Config).root
    uri = export_run(root, given.run)
    print(progress.table([(name, storage.join(uri, name)) for name in FORMATS], title=f"run {given.run}"))


if __name__ == "__main__":
    cli.main(main)
