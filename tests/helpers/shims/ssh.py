"""ssh: runs a command on the host with an instance id, by Systems Manager, or an address, and forwards ports.

ssh [OPTION ...] USER@HOST COMMAND ...
"""

import os
import signal
import sys
from pathlib import Path

from tests.helpers.shims import call

WITH_VALUE = ("-i", "-o", "-L", "-p")


def main() -> int:
    words, options = sys.argv[1:], []
    while words[0].startswith("-"):
        option = words.pop(0)
        options.append((option, words.pop(0) if option in WITH_VALUE else ""))
    target = words.pop(0).partition("@")[2]
    settings = dict(value.partition("=")[::2] for option, value in options if option == "-o")
    for key in (value for option, value in options if option == "-i"):
        if not Path(key).expanduser().is_file() or Path(key).expanduser().stat().st_mode & 0o077:
            print(f"Warning: identity file {key} is missing or readable by others", file=sys.stderr)
            return 255
    if target.startswith("i-") and "ssm start-session" not in settings.get("ProxyCommand", ""):
        print(f"ssh: Could not resolve hostname {target}", file=sys.stderr)
        return 255
    forwards = [value for option, value in options if option == "-L"]
    return call("ssh", target=target, command=" ".join(words), forwards=forwards)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("TERM", "dumb")
    sys.exit(main())
