"""Programs of the simulated cloud: ssh, rsync, docker, the AWS CLI, sudo and shutdown, by the names of the real ones.

Their connection to the test process is a Unix socket, which every host reaches.
"""

import json
import os
import socket
from typing import Any


def call(operation: str, **arguments: Any) -> int:
    """Let the test process do an operation with this process' streams; return the exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["CLOUD_SOCKET"])
        request = {"operation": operation, "host": os.environ["CLOUD_HOST"], **arguments}
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        return int(connection.makefile().readline() or 255)
