"""A dataset → a dataset of the vehicles alone: Detectron2 finds them, the background is removed.

  python jobs/mask.py --config FILE
  python jobs/mask.py --config FILE --limit 100 --cutout.mode crop --detector.weights s3://bucket/detector.safetensors

A photo without a vehicle stays whole and is marked; a killed run continues where it was.
"""

from carclass import command_line
from carclass.masking import quality, stream


def main() -> None:
    """Runs the job."""
    settings = command_line.parse(__doc__, "mask")
    assert settings.mask is not None
    published = stream.run(settings.root, settings.mask)
    iou = quality.measure(settings.root, published, settings.mask)
    print(command_line.dataset_table(published, **({} if iou is None else {"mean mask IoU (test)": f"{iou:.3f}"})))


if __name__ == "__main__":
    command_line.main(main)
