"""shutdown, poweroff and halt: ends the instance as EC2 does when its operating system shuts down.

shutdown [-P] [now|+MINUTES]     days ahead are not simulated
"""

import sys

from tests.helpers.shims import call

if __name__ == "__main__":
    later = any(word.startswith("+") and word != "+0" for word in sys.argv[1:])
    sys.exit(0 if later else call("shutdown"))
