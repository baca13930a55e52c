"""A dataset → an audit: near-duplicates, doubtful labels and poor photos, as a page and a table.

  python jobs/audit.py --config FILE
  python jobs/audit.py --config FILE --dataset v2

Changes nothing: audit.csv has a row for each finding with a suggestion. Features are those of the backbone from which
`train` starts; the labels of all splits are examined.
"""

from carclass import progress
from carclass.config import cli
from carclass.errors import UserError

FLAGS = {"overwrite": {"action": "store_true", "help": "replace the table of a former audit"}}


def main() -> None:
    config, args = cli.parse_job_with_flags(__doc__, "audit", FLAGS)
    if config.train is None:
        raise UserError("`train` is missing, whose backbone compares the photos. Add it to the file.")
    from carclass.audit import audit
    from carclass.data import dataset

    source = dataset.load_dataset(config.root, config.audit.dataset)
    audit.check_table(config.root, source.name, overwrite=args.overwrite)
    found = audit.audit_dataset(config.root, source, config.train)
    rows = [(kind.replace("_", " "), f"{number:,}") for kind, number in found.counts.items()]
    rows.insert(0, ("photos", f"{source.manifest['rows']:,}"))
    rows.append(("in two splits", f"{found.num_leaks:,}"))
    print(progress.table([*rows, ("table", found.table), ("page", found.page)], title=f"audit of {source.name}"))


if __name__ == "__main__":
    cli.main(main)
