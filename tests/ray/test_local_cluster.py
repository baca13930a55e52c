"""The cluster that a job starts on its own machine."""

import os
import subprocess
import sys

import pytest

CODE = """
from carclass.cluster import connection
from ray._common.usage.usage_lib import usage_stats_enabled
connection.connect()
print("usage reports:", usage_stats_enabled())
"""


@pytest.mark.slow  # 8 s: a cluster of its own
@pytest.mark.parametrize(("given", "enabled"), [(None, False), ("1", True)])
def test_ray_reports_its_usage_only_where_a_user_has_asked_for_it(given: str | None, enabled: bool):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables = {} if given is None else {"RAY_USAGE_STATS_ENABLED": given}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=120)
    assert f"usage reports: {enabled}" in done.stdout, done.stderr
