"""Photos and labels → a dataset: read, checked, split and published.

  python jobs/ingest.py --config FILE
  python jobs/ingest.py --config FILE --photos s3://bucket/cars/ --labels s3://bucket/labels.csv --root s3://bucket/out

Photos that can't be used are kept apart with the reason; a second run with the same settings writes nothing.
"""

from carclass.config import cli
from carclass.data import dataset
from carclass.ingestion.ingest import ingest_photos


def main() -> None:
    """Runs the job."""
    settings = cli.parse_job(__doc__, "ingest")
    assert settings.ingest is not None
    published = ingest_photos(settings.root, settings.ingest)
    print(dataset.dataset_table(published))


if __name__ == "__main__":
    cli.main(main)
