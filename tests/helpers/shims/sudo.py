"""sudo: runs a command as is, as users of the simulated hosts are root."""

import os
import sys

if __name__ == "__main__":
    words = sys.argv[1:]
    while words[0].startswith("-") or "=" in words[0]:
        words.pop(0)
    os.execvp(words[0], words)
