"""A job → a Ray cluster: sent, followed to its end; the exit status is the job's.

  python jobs/submit.py -- python jobs/pipeline.py --config my.yml --root s3://bucket/carclass
  python jobs/submit.py --address http://127.0.0.1:8265 -- python jobs/train.py --config my.yml

Only code travels: carclass/, jobs/ and the files that the command names. The same command again follows the job if it
still runs, and else goes on where it ended. The token is RAY_AUTH_TOKEN's, or ~/.ray/auth_token's with
RAY_AUTH_MODE=token. A lost connection, or the end of this program, leaves the job alone.
"""

import argparse
import os
import sys
from pathlib import Path

from carclass.cluster import job_submission
from carclass.config import cli
from carclass.errors import UserError

DASHBOARD = "http://127.0.0.1:8265"


def main() -> None:
    """Runs the job."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--address URL] -- COMMAND ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    there = os.environ.get("RAY_API_SERVER_ADDRESS", DASHBOARD)
    parser.add_argument("--address", metavar="URL", default=there, help="the cluster's dashboard [%(default)s]")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="what the cluster's head runs")
    given = parser.parse_args()
    if not given.command:
        raise UserError("submit what? Give the command after `--`, such as `-- python jobs/train.py --config my.yml`.")
    sys.exit(job_submission.submit_and_follow(given.address, given.command, Path(__file__).resolve().parents[1]))


if __name__ == "__main__":
    cli.main(main)
