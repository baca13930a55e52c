"""sleep of a program that an instance runs at its boot: a minute takes a second.

sleep SECONDS
"""

import sys
import time

FACTOR = 60

if __name__ == "__main__":
    time.sleep(float(sys.argv[1]) / FACTOR)
