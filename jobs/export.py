"""A run → its best model for other programs: safetensors, ONNX and torch.export, in `<run>/export/`.

  python jobs/export.py --config FILE
  python jobs/export.py --run NAME --config FILE
  python jobs/export.py --run NAME --root s3://bucket/carclass

model.onnx and model.pt2 map uint8 (N,3,S,S) RGB photos, S pixels wide and high, to (N,C) logits and calibrated
probabilities, normalisation included. Each file's metadata holds labels and preprocessing, such as masking. The run has
to be evaluated before. A file whose outputs differ from the model's on drawn photos is not published. Needs neither a
cluster nor a GPU, nor the run's datasets.
"""

from pathlib import Path
from typing import get_args

from carclass import progress
from carclass.config import cli, installation
from carclass.config.schema import Config, StageName
from carclass.errors import UserError

SAMPLE = Path(__file__).parent / "experiments" / "sample.yml"
"""Settings beside a root that is given: none of them is used."""


def main() -> None:
    parser = cli.JobParser(__doc__)
    parser.add_argument("--run", metavar="NAME", help="run to export [the one that the file trains]")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--config", type=Path, metavar="FILE", help="YAML file whose `root` holds the run")
    place.add_argument("--root", metavar="URI", help="root of the run: a folder or s3:// prefix")
    parser.add_argument(
        "--stage", choices=get_args(StageName), help="stage whose best epoch to export [best over stages]"
    )
    args = parser.parse()
    overrides = {"root": args.root} if args.root else {}
    config = cli.load_config(installation.find_config(args.config or SAMPLE), overrides, Config)
    name = args.run or (None if args.root else config.or_trained(None))
    if name is None:
        raise UserError("no run is named. Name the run to export, e.g. --run first.")
    from carclass import storage
    from carclass.runs.run import find_run

    find_run(config.root, name)  # a mistake is found before PyTorch is loaded for seconds
    from carclass.runs.export import FORMATS, export_run

    uri = export_run(config.root, name, args.stage)
    print(progress.table([(file, storage.join(uri, file)) for file in FORMATS], title=f"run {name}"))


if __name__ == "__main__":
    cli.main(main)
