"""Photos and labels → a published dataset: read, checked and split.

  python jobs/ingest.py --config FILE
  python jobs/ingest.py --config FILE --photos s3://bucket/cars/ --labels s3://bucket/labels.csv --root s3://bucket/out

Unusable photos are quarantined with the reason. A second run writes nothing. If photos or labels have changed since, it
says what changed; with --update it publishes a new version and reads only the photos that are new. report.html in the
dataset's folder shows classes, splits, sample photos and what was quarantined.
"""

from carclass.config import cli


def main() -> None:
    settings, args = cli.parse_job_with_flags(__doc__, "ingest", cli.UPDATE)
    from carclass import storage
    from carclass.data import dataset
    from carclass.ingestion.ingest import ingest_photos

    assert settings.ingest is not None
    published = ingest_photos(settings.root, settings.ingest, update=args.update)
    report = storage.join(published.uri, "report.html")  # datasets of former versions have none
    print(dataset.dataset_table(published, **({"report": report} if storage.exists(report) else {})))


if __name__ == "__main__":
    cli.main(main)
