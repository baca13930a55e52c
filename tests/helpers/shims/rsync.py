"""rsync: copies a file, or the content of a folder, to another host or into the container on the same host.

rsync [OPTION ...] SOURCE [USER@HOST:|CONTAINER:]TARGET
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

PROGRAM = {"-e": "remote", "--rsh": "remote", "--exclude": "", "--filter": ""}


def main() -> int:
    words, remote, paths = sys.argv[1:], "ssh", []
    while words:
        word = words.pop(0)
        if word in PROGRAM:
            value = words.pop(0)
            remote = value if PROGRAM[word] else remote
        elif not word.startswith("-"):
            paths.append(word)
    source, (host, _, target) = Path(paths[0]), paths[1].partition(":")
    name = "." if paths[0].endswith(("/", "/.")) else source.name
    folder = target if name == "." else os.path.dirname(target)
    renamed = "" if name == "." else shlex.quote(f"--transform=s,^{name}$,{os.path.basename(target)},")
    folder = folder if folder.startswith("~") else shlex.quote(folder)
    unpack = f"mkdir -p {folder} && tar -x {renamed} -C {folder}"
    command = shlex.split(remote)
    command += [host, unpack] if command[0] == "ssh" else [host, "sh", "-c", unpack]
    with subprocess.Popen(["tar", "-c", "-C", source if name == "." else source.parent, name], stdout=-1) as pack:
        status = subprocess.run(command, stdin=pack.stdout, check=False).returncode
    return status or pack.returncode


if __name__ == "__main__":
    sys.exit(main())
