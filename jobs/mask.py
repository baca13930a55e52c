"""A dataset → a dataset of vehicles alone: Detectron2 detects them, the background is removed.

  python jobs/mask.py --config FILE --preview 40        a contact sheet and a report of 40 photos, nothing published
  python jobs/mask.py --config FILE
  python jobs/mask.py --config FILE --cutout.mode crop --detector.weights s3://bucket/detector.safetensors

A photo without a vehicle is kept whole and marked. An interrupted job resumes. report.html in the dataset's folder
shows the most doubtful masks; `exclude` quarantines such photos.
"""

from carclass import progress
from carclass.config import cli
from carclass.errors import UserError

MAX_PREVIEW = 500
PREVIEW = {
    "type": int,
    "metavar": "N",
    "help": f"mask N photos (at most {MAX_PREVIEW}), chosen by content, for a contact sheet and a report only",
}


def main() -> None:
    settings, args = cli.parse_job_with_flags(__doc__, "mask", {"preview": PREVIEW, **cli.UPDATE})
    if args.preview is not None and not 1 <= args.preview <= MAX_PREVIEW:
        raise UserError(f"`--preview` is {args.preview}. Give a number of photos from 1 to {MAX_PREVIEW}.")
    from carclass import storage
    from carclass.data import dataset
    from carclass.models.weights_place import check_weights_place

    assert settings.mask is not None
    dataset.load_dataset(settings.root, settings.mask.source)
    check_weights_place(settings.mask.detector.weights, "mask.detector.weights")
    from carclass.masking import quality  # late: it takes seconds to load
    from carclass.masking.mask import mask_dataset, preview_masks

    if args.preview is not None:
        uri = preview_masks(settings.root, settings.mask, args.preview)
        rows = [(name, storage.join(uri, name)) for name in ("contact_sheet.jpg", "report.html")]
        print(progress.table(rows, title="preview, nothing published"))
        return
    published = mask_dataset(settings.root, settings.mask, update=args.update)
    iou = quality.mean_test_iou(settings.root, published, settings.mask)
    quality_row = {} if iou is None else {"mean mask IoU (test)": f"{iou:.3f}"}
    print(dataset.dataset_table(published, **quality_row, report=storage.join(published.uri, "report.html")))


if __name__ == "__main__":
    cli.main(main)
