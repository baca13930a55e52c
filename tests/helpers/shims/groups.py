"""usermod and id: membership of the group docker, which takes effect at once.

usermod -aG GROUP USER | id -nG
"""

import os
import sys
from pathlib import Path

FILE = Path("/home/ubuntu/.groups")

if __name__ == "__main__":
    program, *words = sys.argv[1:]
    if program == "usermod":
        FILE.write_text(f"{words[1]}\n")
    elif words == ["-nG"]:
        print("ubuntu", FILE.read_text() if FILE.exists() else "")
    else:
        os.execv("/usr/bin/id", ["id", *words])
