"""Photos and labels → a published dataset: read, checked and split.

  python jobs/ingest.py --config FILE
  python jobs/ingest.py --config FILE --photos s3://bucket/cars/ --labels s3://bucket/labels.csv --root s3://bucket/out

Unusable photos are quarantined with the reason. A second run with the same settings writes nothing.
"""

from carclass.config import cli


def main() -> None:
    settings = cli.parse_job(__doc__, "ingest")
    from carclass.data import dataset
    from carclass.ingestion.ingest import ingest_photos

    assert settings.ingest is not None
    published = ingest_photos(settings.root, settings.ingest)
    print(dataset.dataset_table(published))


if __name__ == "__main__":
    cli.main(main)
