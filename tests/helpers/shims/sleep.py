"""sleep of a program that an instance runs at its boot: a minute takes four seconds.

Half an hour, after which an instance without Ray ends, is then longer than its setup takes on a busy machine.

sleep SECONDS
"""

import sys
import time

FACTOR = 15

if __name__ == "__main__":
    time.sleep(float(sys.argv[1]) / FACTOR)
