"""A dataset → a dataset of the vehicles alone: Detectron2 finds them, the background is removed.

  python jobs/mask.py --config FILE --preview 40        only look: a contact sheet and a report of 40 photos
  python jobs/mask.py --config FILE
  python jobs/mask.py --config FILE --cutout.mode crop --detector.weights s3://bucket/detector.safetensors

A photo without a vehicle stays whole and is marked; a killed run continues where it was. report.html beside the
dataset shows the most doubtful masks; `exclude` sends such photos to quarantine.
"""

from carclass import progress, storage
from carclass.config import cli
from carclass.data import dataset
from carclass.masking import quality
from carclass.masking.mask import mask_dataset, preview_masks


def main() -> None:
    """Runs the job."""
    settings = cli.parse_job(__doc__, "mask")
    assert settings.mask is not None
    if settings.mask.preview is not None:
        uri = preview_masks(settings.root, settings.mask)
        rows = [(name, storage.join(uri, name)) for name in ("contact_sheet.jpg", "report.html")]
        print(progress.table(rows, title="preview, nothing published"))
        return
    published = mask_dataset(settings.root, settings.mask)
    iou = quality.measure(settings.root, published, settings.mask)
    more = {} if iou is None else {"mean mask IoU (test)": f"{iou:.3f}"}
    print(dataset.dataset_table(published, **more, look=storage.join(published.uri, "report.html")))


if __name__ == "__main__":
    cli.main(main)
