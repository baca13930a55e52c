"""Submission of a job to a Ray cluster: follows it to its end and exits with its status.

  python jobs/submit.py -- python jobs/pipeline.py --config my.yml --root s3://bucket/carclass
  python jobs/submit.py --address http://127.0.0.1:8265 -- python jobs/train.py --config my.yml

Only code is uploaded: carclass/, jobs/ and the files that the command names, which are in the working directory. The
same command again follows the job if it is still running, and otherwise resumes it. The token is RAY_AUTH_TOKEN, or the
content of ~/.ray/auth_token with RAY_AUTH_MODE=token. A lost connection, or the end of this program, does not stop the
job.
"""

import os
import sys
from pathlib import Path

from carclass.config import cli, installation
from carclass.errors import UserError

DASHBOARD = "http://127.0.0.1:8265"
CODE = {"carclass": installation.PACKAGE, "jobs": installation.JOBS}
"""Folders to upload."""


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

    # The cluster has carclass' dependencies; its code, and so the command `carclass`, comes with the job.
    program, *rest = args.command
    command = ["python", "-m", "carclass", *rest] if Path(program).name == "carclass" else args.command
    sys.exit(job_submission.submit_and_follow(args.address, command, CODE, {CODE_VERSION: code_version()}))


if __name__ == "__main__":
    cli.main(main)
