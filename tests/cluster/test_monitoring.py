"""Prometheus scrapes jobs that run: every panel of the dashboard has data, and alarms go off when they should."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.helpers.clusters import JOBS, RAY, free_port, kill, wait_for

GRAFANA = Path(__file__).parents[2] / "cluster" / "grafana"
DASHBOARD = json.loads((GRAFANA / "carclass.json").read_text())
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}
ALERTS = yaml.safe_load((GRAFANA / "alerts.yml").read_text())["groups"][0]["rules"]
QUIET = {"GPU use": "no GPU here", "GPU memory": "no GPU here", "Nodes to come": "nothing here starts nodes"}
"""Panels that can have no data where the tests run."""
SHOWN = [(title, target["expr"]) for title, one in PANELS.items() if title not in QUIET for target in one["targets"]]
USD = 0.526
DIVERGED = """
import time, ray
from carclass import telemetry
ray.init(log_to_driver=False)
finite = dict.fromkeys(("val_loss", "train_accuracy", "val_accuracy"), 0.5)
telemetry.epoch_finished("broken", "unfrozen", {"epoch": 3, "train_loss": float("nan"), **finite})
"""

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")


class Prometheus(NamedTuple):
    """A Prometheus that has watched jobs, and when that was."""

    url: str
    began: float
    ended: float

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series that a panel draws with this query."""
        given = {"query": query, "start": self.began, "end": self.ended, "step": 1}
        with urllib.request.urlopen(f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(given)}") as answer:
            return list(json.load(answer)["data"]["result"])

    def values(self, query: str) -> list[float]:
        """The only series of a query."""
        (series,) = self.ask(query)
        return [float(value) for _, value in series["values"]]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of a head with a token whose node says what it costs, and of its jobs; all export every two seconds."""
    gcs, dashboard, folder = free_port(), free_port(), tempfile.mkdtemp(prefix="ray-")
    known = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": folder}
    given = {**known, **token, "RAY_metrics_report_interval_ms": "2000", "OMP_NUM_THREADS": "1"}
    # Ray's ports for these are fixed, and may be another cluster's.
    given |= {f"{part}_METRIC_PORT": str(free_port()) for part in ("AUTOSCALER", "DASHBOARD")}
    given["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
    command += [f"--labels=usd-per-hour={USD}", f"--dashboard-port={dashboard}", "--object-store-memory=300000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
    log = Path(folder) / "head.log"
    with log.open("w") as out:
        head = subprocess.Popen(command, env=given, stdout=out, stderr=out)
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(), head, log)
        yield {**given, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    finally:
        kill(head)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus with our configuration, but for where Ray's folder is and how often it looks."""
    folder, url = tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{free_port()}"
    found = (GRAFANA / "prometheus.yml").read_text().replace("/tmp/ray/", f"{environment['RAY_TMPDIR']}/ray/")
    (folder / "prometheus.yml").write_text(re.sub(r"(interval): 10s", r"\1: 2s", found))
    shutil.copy(GRAFANA / "alerts.yml", folder)
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    log = folder / "server.log"
    with log.open("w") as out:
        process = subprocess.Popen([*command, f"--web.listen-address={url}"], stdout=out, stderr=out)
    try:
        wait_for(lambda: "Server is ready" in log.read_text(), process, log)
        yield f"http://{url}"
    finally:
        kill(process)


def run(environment: dict[str, str], *program: str | Path) -> None:
    done = subprocess.run([sys.executable, *program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def watched(
    environment: dict[str, str], server: str, photos_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Prometheus:
    """What Prometheus saw of a pipeline, of a sweep and of a run whose loss is no number."""
    folder, began = tmp_path_factory.mktemp("watched"), time.time()
    train = {"name": "watched", "parent": "sample", "model": {"architecture": "resnet26-narrow", "image_size": 64}}
    settings = {
        "root": str(folder),
        "ingest": {"photos": f"{photos_folder}/photos", "labels": f"{photos_folder}/labels.csv", "part_rows": 20},
        "mask": {
            "part_rows": 10,
            "detector": {"model": "sample", "weights": "sample", "short_side": 160},
            "exclude": {"no_vehicle": True, "min_area_fraction": 0.25},
        },
        "train": {**train, "frozen": {"epochs": 4}, "unfrozen": {"epochs": 2, "batch_size": 16}},
    }
    (folder / "pipeline.yml").write_text(yaml.safe_dump(settings))
    run(environment, JOBS / "pipeline.py", "--config", folder / "pipeline.yml")
    search = {
        "name": "heads",
        "experiment": str(folder / "pipeline.yml"),
        "fixed": {"train.unfrozen": None},
        "space": {"train.frozen.lr": {"min": 1e-3, "max": 1e-2}},
        "num_trials": 1,
        "num_seeds": 1,
    }
    (folder / "search.yml").write_text(yaml.safe_dump(search))
    run(environment, JOBS / "tune.py", "--config", folder / "search.yml")
    run(environment, "-c", DIVERGED)
    time.sleep(5)  # for a last look
    return Prometheus(server, began, time.time())


@pytest.mark.parametrize(("title", "query"), SHOWN)
def test_every_panel_shows_data_of_running_jobs(watched: Prometheus, title: str, query: str):
    assert watched.ask(query) != []


@pytest.mark.parametrize("title", QUIET)
def test_panels_without_data_ask_prometheus_something_it_understands(watched: Prometheus, title: str):
    for target in PANELS[title]["targets"]:
        watched.ask(target["expr"])


def test_the_queue_empties_while_photos_come_out(watched: Prometheus):
    queue = watched.values('sum by (verb) (ray_carclass_queue{verb="mask"})')
    assert queue[0] == max(queue) > 0
    assert queue[-1] == 0


def test_no_photos_per_second_are_told_when_a_job_has_gone_on_to_something_else(watched: Prometheus):
    assert watched.values('sum by (verb) (ray_carclass_photos_per_second{verb="mask"})')[-1] == 0


def test_cost_is_that_of_the_node_label_for_as_long_as_the_job_runs(watched: Prometheus):
    for series in watched.ask("ray_carclass_cost_usd"):
        (first, least), (last, most) = series["values"][0], series["values"][-1]
        assert float(most) - float(least) == pytest.approx(USD * (last - first) / 3600, abs=USD * 25 / 3600)
        assert float(most) > 0


def test_a_loss_that_is_no_number_is_told(watched: Prometheus):
    assert set(watched.values('ray_carclass_diverged{run="broken"}')) == {1.0}
    assert set(watched.values('ray_carclass_diverged{run="watched", stage="frozen"}')) == {0.0}


def test_the_alarm_of_such_a_loss_goes_off(watched: Prometheus):
    assert watched.ask('ALERTS{alertname="CarclassLossDiverged", alertstate="firing", run="broken"}') != []


@pytest.mark.parametrize("title", PANELS)
def test_panels_have_a_unit_one_sentence_and_the_chosen_data_source(title: str):
    panel = PANELS[title]
    sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert re.fullmatch(r"[^.]+(\.\d[^.]*)*\.", panel["description"])
    assert {source["uid"] for source in sources} == {"${datasource}"}


def test_the_dashboard_asks_for_its_data_source():
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")


def test_the_configuration_is_valid():
    checked = subprocess.run(
        ["promtool", "check", "config", GRAFANA / "prometheus.yml"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alarms_go_off_when_they_should_and_else_not():
    command = ["promtool", "test", "rules", Path(__file__).with_name("alerts_test.yml")]
    tested = subprocess.run(command, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("name", [rule["alert"] for rule in ALERTS])
def test_the_runbook_says_what_to_do_about_each_alarm(name: str):
    assert f"`{name}`" in (GRAFANA.parents[1] / "docs" / "monitoring.md").read_text()
