"""Shell commands of a Markdown page: those of its sh blocks in order, and those within its text."""

import re
import subprocess
from typing import NamedTuple

BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
PROGRAMS = {"aws", "carclass", "docker", "kubectl", "python", "ray"}
"""Programs whose commands within text are found."""
SETTING = re.compile(r"(export )?\w+=")


class Command(NamedTuple):
    """A command as typed, after the assignments of its block that precede it."""

    text: str
    settings: str = ""

    @property
    def line(self) -> str:
        """The whole command line."""
        return f"{self.settings}{self.text}"


def read_blocks(page: str) -> list[Command]:
    """Return the commands of a page's sh blocks; assignments are settings of the commands that follow in the block."""
    commands = []
    for block in BLOCK.findall(page):
        settings = pending = ""
        for line in block.splitlines(keepends=True):
            pending += line
            if line.endswith("\\\n") or not pending.strip() or not _is_complete(pending):
                continue
            if SETTING.match(pending):
                settings += pending
            else:
                commands.append(Command(pending.strip(), settings))
            pending = ""
    return commands


def read_spans(page: str) -> list[Command]:
    """Return the commands within a page's text that have an argument which is not a plain word."""
    spans = [" ".join(span.split()) for span in SPAN.findall(FENCED.sub("", page))]
    return [
        Command(span)
        for span in spans
        if span.split()[0].rpartition("/")[2] in PROGRAMS and re.search(r"[^\w ]", span.partition(" ")[2])
    ]


def _is_complete(text: str) -> bool:
    """Return True if a shell can parse a text."""
    return subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).returncode == 0
