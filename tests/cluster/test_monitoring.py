"""Prometheus scrapes running jobs: every panel of the dashboard has data, and alerts fire when they should."""

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
WITHOUT_DATA = {"GPU utilization": "no GPU", "GPU memory": "no GPU", "Pending nodes": "no autoscaler"}
"""Panels without data in tests."""
SHOWN = [
    (title, target["expr"])
    for title, panel in PANELS.items()
    if title not in WITHOUT_DATA
    for target in panel["targets"]
]
USD = 0.526
DIVERGED = """
import time, ray
from carclass.cluster import telemetry
ray.init(log_to_driver=False)
finite = dict.fromkeys(("train_loss", "val_loss", "train_accuracy", "val_accuracy"), 0.5)
telemetry.report_epoch("broken", "unfrozen", {"epoch": 3, **finite})
telemetry.report_divergence("broken", "unfrozen")
"""

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus")


class Prometheus(NamedTuple):
    """A Prometheus that has scraped jobs, and the time range."""

    url: str
    started: float
    ended: float

    def query(self, query: str) -> list[dict[str, Any]]:
        """Return the series of a query over the time range."""
        parameters = {"query": query, "start": self.started, "end": self.ended, "step": 1}
        with urllib.request.urlopen(f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(parameters)}") as response:
            return list(json.load(response)["data"]["result"])

    def values(self, query: str) -> list[float]:
        """Return the values of a query's only series."""
        (series,) = self.query(query)
        return [float(value) for _, value in series["values"]]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Start a head with a token, a price label and export every 2 s; yield the environment of its jobs."""
    gcs, dashboard, folder = free_port(), free_port(), tempfile.mkdtemp(prefix="ray-")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_TMPDIR": folder}
    environment = {**environ, **token, "RAY_metrics_report_interval_ms": "2000", "OMP_NUM_THREADS": "1"}
    # Ray's default ports for these may be in use by another cluster.
    environment |= {f"{part}_METRIC_PORT": str(free_port()) for part in ("AUTOSCALER", "DASHBOARD")}
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{dashboard}"
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1", f"--port={gcs}"]
    command += [f"--labels=usd-per-hour={USD}", f"--dashboard-port={dashboard}", "--object-store-memory=300000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
    log = Path(folder) / "head.log"
    with log.open("w") as out:
        head = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        wait_for(lambda: "Ray runtime started" in log.read_text(), head, log)
        yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    finally:
        kill(head)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start a Prometheus with cluster/grafana's configuration, another Ray folder and a 2 s interval; yield its URL."""
    folder, url = tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{free_port()}"
    config = (GRAFANA / "prometheus.yml").read_text().replace("/tmp/ray/", f"{environment['RAY_TMPDIR']}/ray/")
    (folder / "prometheus.yml").write_text(re.sub(r"(interval): 10s", r"\1: 2s", config))
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
def scraped(
    environment: dict[str, str], server: str, photos_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Prometheus:
    """Run a pipeline, a sweep and a diverged run while Prometheus scrapes them."""
    folder, started = tmp_path_factory.mktemp("scraped"), time.time()
    train = {"name": "scraped", "parent": "sample", "model": {"architecture": "resnet26-narrow", "image_size": 64}}
    settings = {
        "root": str(folder),
        "ingest": {"photos": f"{photos_folder}/photos", "labels": f"{photos_folder}/labels.csv", "part_rows": 20},
        "mask": {
            "part_rows": 10,
            "detector": {"model": "sample", "weights": "sample", "short_side": 160},
            "exclude": {"no_vehicle": True, "min_area_fraction": 0.25},
        },
        "train": {**train, "frozen": {"epochs": 4}, "unfrozen": None},
    }
    (folder / "pipeline.yml").write_text(yaml.safe_dump(settings))
    run(environment, JOBS / "pipeline.py", "--config", folder / "pipeline.yml")
    search = {
        "name": "heads",
        "experiment": str(folder / "pipeline.yml"),
        "space": {"train.frozen.lr": {"min": 1e-3, "max": 1e-2}},
        "num_trials": 1,
        "num_seeds": 1,
    }
    (folder / "search.yml").write_text(yaml.safe_dump(search))
    run(environment, JOBS / "tune.py", "--config", folder / "search.yml")
    run(environment, "-c", DIVERGED)
    time.sleep(5)  # for a last scrape
    return Prometheus(server, started, time.time())


@pytest.mark.nightly  # 90 s with its fixture
@pytest.mark.parametrize(("title", "query"), SHOWN)
def test_every_panel_shows_data_of_running_jobs(scraped: Prometheus, title: str, query: str):
    assert scraped.query(query) != []


@pytest.mark.nightly  # 90 s with its fixture
@pytest.mark.parametrize("title", WITHOUT_DATA)
def test_panels_without_data_have_valid_queries(scraped: Prometheus, title: str):
    for target in PANELS[title]["targets"]:
        scraped.query(target["expr"])


@pytest.mark.nightly  # 90 s with its fixture
def test_the_queue_empties_while_photos_are_processed(scraped: Prometheus):
    queue = scraped.values('sum by (verb) (ray_carclass_queue{verb="mask"})')
    assert queue[0] == max(queue) > 0
    assert queue[-1] == 0


@pytest.mark.nightly  # 90 s with its fixture
def test_photos_per_second_are_zero_after_the_step(scraped: Prometheus):
    assert scraped.values('sum by (verb) (ray_carclass_photos_per_second{verb="mask"})')[-1] == 0


@pytest.mark.nightly  # 90 s with its fixture
def test_cost_is_the_price_label_times_the_jobs_duration(scraped: Prometheus):
    for series in scraped.query("ray_carclass_cost_usd"):
        (first, least), (last, most) = series["values"][0], series["values"][-1]
        assert float(most) - float(least) == pytest.approx(USD * (last - first) / 3600, abs=USD * 25 / 3600)
        assert float(most) > 0


@pytest.mark.nightly  # 90 s with its fixture
def test_a_non_finite_loss_is_exported(scraped: Prometheus):
    assert set(scraped.values('ray_carclass_diverged{run="broken"}')) == {1.0}
    assert set(scraped.values('ray_carclass_diverged{run="scraped", stage="frozen"}')) == {0.0}


@pytest.mark.nightly  # 90 s with its fixture
def test_a_non_finite_loss_fires_its_alert(scraped: Prometheus):
    assert scraped.query('ALERTS{alertname="CarclassLossDiverged", alertstate="firing", run="broken"}') != []


@pytest.mark.parametrize("title", PANELS)
def test_panels_have_a_unit_one_sentence_and_the_chosen_data_source(title: str):
    panel = PANELS[title]
    sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert re.fullmatch(r"[^.]+(\.\d[^.]*)*\.", panel["description"])
    assert {source["uid"] for source in sources} == {"${datasource}"}


def test_the_dashboard_has_a_variable_for_its_data_source():
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")


def test_the_configuration_is_valid():
    checked = subprocess.run(
        ["promtool", "check", "config", GRAFANA / "prometheus.yml"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_alerts_fire_when_they_should_only():
    command = ["promtool", "test", "rules", Path(__file__).with_name("alerts_test.yml")]
    tested = subprocess.run(command, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("name", [rule["alert"] for rule in ALERTS])
def test_the_runbook_has_an_action_for_each_alert(name: str):
    assert f"`{name}`" in (GRAFANA.parents[1] / "docs" / "monitoring.md").read_text()
