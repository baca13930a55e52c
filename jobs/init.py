"""Photos → a commented config file: their layout, classes and sizes, and settings that fit data and machine.

  python jobs/init.py photos/                                     a folder per class, or train/val/test of such folders
  python jobs/init.py photos/ --labels labels.csv                 a table with the columns img_name,class,subset
  python jobs/init.py photos/ --labels labels.csv --columns '{name: file, class: make}'        or with other columns
  python jobs/init.py s3://bucket/cars.zip --output cars.yml      an archive; or an s3:// prefix

Looks at names, labels and a few photos only, in seconds, and prints what it found, a rough estimate of time and memory,
and the command to run next. What it counts is what jobs/ingest.py then reads.
"""

import shlex
from pathlib import Path

from carclass import progress
from carclass.config import cli
from carclass.formatting import terminal_text

NEXT = "python jobs/pipeline.py --config"


def main() -> None:
    parser = cli.JobParser(__doc__)
    parser.add_argument("photos", metavar="PHOTOS", help="folder, s3:// prefix or archive of photos")
    parser.add_argument("--labels", metavar="FILE", help="table of labels (.csv, .tsv, .jsonl), or the devkit's folder")
    parser.add_argument(
        "--columns", metavar="MAPPING", help="columns of the table: {name: file, class: make, subset: part}"
    )
    parser.add_argument("--output", metavar="FILE", default="my.yml", help="config file to write [my.yml]")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    args = parser.parse()
    from carclass.experiments import estimate, first_config, survey_text
    from carclass.experiments.machine import this_machine
    from carclass.ingestion.survey import survey_source

    first_config.check_output(args.output, args.photos, overwrite=args.overwrite)
    results, machine = Path(args.output).resolve().parent / "results", this_machine()
    columns = None if args.columns is None else cli.parse_value(args.columns)
    survey = survey_source(str(results), args.photos, args.labels, columns)
    root = first_config.choose_root(results, survey.settings)
    settings = first_config.choose_settings(root, survey, machine)
    findings = survey_text.describe_survey(survey)
    steps = estimate.plan_steps(settings, first_config.planned_photos(survey), machine)
    plan = [*estimate.describe_steps(steps), ("downloads", first_config.DOWNLOADS)]
    plan.append(("assumed", f"{machine.text}; {estimate.BASIS}"))
    command = cli.name_commands(f"{NEXT} {shlex.quote(args.output)}")
    if (obstacle := survey_text.find_obstacle(survey)) is not None:
        command = f"{obstacle}; then {command}"
    facts = [("Next", command), None, *findings, None, *plan]
    header = ["" if fact is None else ": ".join(fact) for fact in facts]
    first_config.write_config(args.output, settings, header, overwrite=args.overwrite)
    print(terminal_text(progress.table(findings, title=f"photos in {survey.settings.photos}")))
    print(f"\n{progress.table(plan, title='plan')}\n")
    for text in survey_text.list_warnings(survey, machine):
        print(terminal_text(f"note: {text}"))
    if root != str(results):
        print(terminal_text(f"note: {results} has a dataset of other photos, so results go to {root}"))
    print(f"{args.output} is written. Next: {command}")


if __name__ == "__main__":
    cli.main(main)
