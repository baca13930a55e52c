"""The command `carclass`: `carclass train …` runs jobs/train.py, as `python -m carclass train …` does."""

import ast
import runpy
import sys
from importlib import metadata
from pathlib import Path

import carclass
from carclass.config.installation import JOBS, MissingPackageReport
from carclass.errors import UserError, exit_on_closed_output, suggest_names
from carclass.formatting import terminal_text

HELP = """usage: carclass COMMAND [OPTION ...]

{description}

commands:
{commands}

`carclass COMMAND --help` shows a command's options; `carclass pipeline` alone runs the embedded sample.
`carclass --version` prints the version."""


def main() -> None:
    """Run the job that the command line names, or list the jobs."""
    try:
        with exit_on_closed_output(), MissingPackageReport():
            run_command(sys.argv[1:])
    except UserError as error:
        print(f"error: {terminal_text(str(error))}", file=sys.stderr)
        sys.exit(2)


def run_command(arguments: list[str]) -> None:
    """Run a command of carclass. Raise UserError for an unknown one."""
    jobs = {path.stem: path for path in sorted(JOBS.glob("*.py"))}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        commands = "\n".join(f"  {name:<10} {first_line(path)}" for name, path in jobs.items())
        print(HELP.format(description=carclass.__doc__, commands=commands))
        return
    if arguments == ["--version"]:
        print(f"carclass {metadata.version('carclass')}")
        return
    name, *options = arguments
    if name not in jobs:
        raise UserError(
            f"`{name}` is not a command of carclass; {suggest_names(name, jobs) or 'see `carclass --help`'}"
        )
    from carclass.config import cli  # late: the list of commands needs no settings

    sys.argv = [f"carclass {name}", *options]
    cli.main(runpy.run_path(str(jobs[name]))["main"])


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring, without running the module."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
