"""Submission of a job to a Ray cluster: follows it to its end and exits with its status.

  python jobs/submit.py -- python jobs/pipeline.py --config my.yml --root s3://bucket/carclass
  python jobs/submit.py --address http://127.0.0.1:8265 -- python jobs/train.py --config my.yml
  python jobs/submit.py --env CARS196=s3://bucket/cars196 -- python jobs/pipeline.py --config my.yml

Only code is uploaded: carclass/, jobs/ and the files that the command and its config files name, which are in the
working directory. Paths that the cluster would not have are refused. The job gets the variables that config files name,
and those of --env; the dashboard shows them, so give no secrets. The same command again follows the job if it is still
running with the same files and variables, and otherwise resumes it. With RAY_AUTH_MODE=token, the token is
RAY_AUTH_TOKEN, or that of the file RAY_AUTH_TOKEN_PATH. A lost connection, or the end of this program, does not stop
the job.
"""

import logging
import os
import re
import sys
from pathlib import Path

from carclass.config import cli, installation
from carclass.errors import UserError

log = logging.getLogger("carclass.submit")
DASHBOARD = "http://127.0.0.1:8265"
CODE = {"carclass": installation.PACKAGE, "jobs": installation.JOBS}
"""Folders to upload."""
SECRET = re.compile("SECRET|TOKEN|PASSWORD|KEY")
"""Names of variables that may be secrets."""


def main() -> None:
    parser = cli.JobParser(__doc__, "%(prog)s [--address URL] -- COMMAND ...")
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD
    parser.add_argument("--address", metavar="URL", default=address, help="the cluster's dashboard [%(default)s]")
    parser.add_argument(
        "--env", metavar="NAME=VALUE", action="append", default=[], help="variable for the job; may be given repeatedly"
    )
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="command to run on the cluster's head")
    args = parser.parse()
    if not args.command:
        raise UserError("no command to submit. Give it after `--`, such as `-- python jobs/train.py --config my.yml`.")
    variables = dict(read_variable(text) for text in args.env)
    if shown := [name for name in variables if SECRET.search(name)]:
        log.warning("submit: the dashboard shows the values of %s to all who can open it", ", ".join(shown))
    os.environ.update(variables)  # as the job will read config files
    from carclass.cluster import job_inputs, job_submission
    from carclass.runs.environment import CODE_VERSION, code_version

    # The cluster has carclass' dependencies; its code, and so the command `carclass`, comes with the job.
    program, *rest = args.command
    command = ["python", "-m", "carclass", *rest] if Path(program).name == "carclass" else args.command
    files = job_inputs.find_files(command, Path.cwd())
    variables = job_inputs.find_variables(files.values()) | variables
    if variables:
        log.info("submit: variables of the job: %s", ", ".join(variables))
    digest = job_inputs.digest_inputs(files, variables)
    variables[CODE_VERSION] = code_version()
    submission = job_submission.Submission(command, {**CODE, **files}, variables, digest)
    sys.exit(job_submission.submit_and_follow(args.address, submission))


def read_variable(text: str) -> tuple[str, str]:
    """Return name and value of a variable. Raise UserError if it is not written NAME=VALUE."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise UserError(f"`--env {text}` is not NAME=VALUE, such as --env CARS196=s3://bucket/cars196")
    return name, value


if __name__ == "__main__":
    cli.main(main)
