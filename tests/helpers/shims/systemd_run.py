"""systemd-run: starts a command in the background.

systemd-run [--OPTION=VALUE ...] COMMAND ...
"""

import subprocess
import sys

if __name__ == "__main__":
    words = sys.argv[1:]
    while words[0].startswith("-"):
        words.pop(0)
    subprocess.Popen(words, start_new_session=True)
