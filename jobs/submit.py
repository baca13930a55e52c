"""Submission of a job to a Ray cluster: follows it to its end and exits with its status.

  python jobs/submit.py -- python jobs/pipeline.py --config my.yml --root s3://bucket/carclass
  python jobs/submit.py --address http://127.0.0.1:8265 -- python jobs/train.py --config my.yml

Only code is uploaded: carclass/, jobs/ and the files that the command names. The same command again follows the job if
it is still running, and otherwise resumes it. The token is RAY_AUTH_TOKEN, or the content of ~/.ray/auth_token with
RAY_AUTH_MODE=token. A lost connection, or the end of this program, does not stop the job.
"""

import os
import sys
from pathlib import Path

from carclass.config import cli
from carclass.errors import UserError

DASHBOARD = "http://127.0.0.1:8265"
CODE = ("carclass", "jobs")
"""Folders of the checkout to upload."""


def main() -> None:
    parser = cli.JobParser(__doc__, "%(prog)s [--address URL] -- COMMAND ...")
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD
    parser.add_argument("--address", metavar="URL", default=address, help="the cluster's dashboard [%(default)s]")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="command to run on the cluster's head")
    args = parser.parse()
    if not args.command:
        raise UserError("no command to submit. Give it after `--`, such as `-- python jobs/train.py --config my.yml`.")
    from carclass.cluster import job_submission
    from carclass.runs.environment import CODE_VERSION, code_version

    checkout, variables = Path(__file__).resolve().parents[1], {CODE_VERSION: code_version()}
    sys.exit(job_submission.submit_and_follow(args.address, args.command, checkout, CODE, variables))


if __name__ == "__main__":
    cli.main(main)
