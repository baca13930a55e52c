"""Jobs on a cluster with only a head wait for labelled nodes, which Ray's autoscaler starts as local processes."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from carclass.config.schema import TrainSettings
from carclass.data import photo
from carclass.sample.generate import write_sample
from tests.helpers import runs
from tests.helpers.clusters import RAY, free_port, kill, wait_for
from tests.helpers.evaluated_run import publish_photos

REPO = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.nightly]  # 60 s, on many nodes
HEAD_ID = "f" * 51 + "00000"
PROVIDER = {
    "type": "external",
    "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
    "head_node_id": HEAD_ID,
    "launch_multiple": True,
}
MASK = {"carclass-work": "mask"}
NODES = {
    "read": {"resources": {"CPU": 1}, "labels": {"carclass-work": "read"}, "max_workers": 2},
    "mask": {"resources": {"CPU": 1, "GPU": 1}, "labels": {**MASK, "carclass-max-nodes": "2"}, "max_workers": 2},
    "train": {"resources": {"CPU": 1, "GPU": 2}, "labels": {"carclass-work": "train"}, "max_workers": 1},
    "ray.head.default": {"resources": {"CPU": 0}, "max_workers": 0},
}
AUTOSCALER = {
    "cluster_name": "autoscaled",
    "max_workers": 5,
    "idle_timeout_minutes": 10,
    "available_node_types": {name: {"node_config": {}, "min_workers": 0, **node} for name, node in NODES.items()},
    "head_node_type": "ray.head.default",
    "upscaling_speed": 20,
    "auth": {},
    "docker": {},
    **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "file_mounts": {},
    "cluster_synced_files": [],
    "rsync_exclude": [],
    "rsync_filter": [],
}


@pytest.fixture(scope="module")
def autoscaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Return the environment of a job on a head without CPUs, whose autoscaler may add nodes of three kinds."""
    folder, port = tmp_path_factory.mktemp("autoscaled"), free_port()
    provider = {**PROVIDER, "gcs_address": f"127.0.0.1:{port}"}
    (folder / "cluster.yaml").write_text(yaml.safe_dump({**AUTOSCALER, "provider": provider}))
    environ = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = {**environ, **token, "RAY_TMPDIR": tempfile.mkdtemp(prefix="ray-")}
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_enable_autoscaler_v2": "1"}
    fake |= {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    options = ["--head", "--block", f"--port={port}", "--num-cpus=0", "--num-gpus=0", "--node-ip-address=127.0.0.1"]
    options += ["--labels=carclass-work=head", f"--autoscaling-config={folder}/cluster.yaml"]
    options += [f"--dashboard-port={free_port()}", "--object-store-memory=100000000"]
    with (folder / "head.log").open("w") as out:
        head = subprocess.Popen([RAY, "start", *options], env={**environment, **fake}, stdout=out, stderr=out)
    try:
        wait_for(lambda: "Ray runtime started" in (folder / "head.log").read_text(), head, folder / "head.log")
        yield {**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        kill(head)
        shutil.rmtree(environment["RAY_TMPDIR"], ignore_errors=True)


def run(environment: dict[str, str], code: str) -> subprocess.CompletedProcess:
    """Run a job of a few lines, the last line of its output is its result as JSON."""
    imports = "from carclass.cluster import connection, resources\nfrom carclass.errors import UserError\n"
    start = f"import json, ray\n{imports}connection.connect()\n"
    command = [sys.executable, "-c", start + textwrap.dedent(code)]
    return subprocess.run(command, env=environment, cwd=REPO, capture_output=True, text=True, timeout=180, check=False)


def result(done: subprocess.CompletedProcess) -> object:
    """Parse the result of a job that succeeded."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PLANNED = """
from carclass.config.schema import Config
from carclass.experiments.pipeline_preflight import check_pipeline
from carclass.data.inventory import Inventory
sections = {{"ingest": {{"photos": "{photos}"}}, "train": {train}}}
with Inventory() as inventory:
    check_pipeline(Config.model_validate({{"root": "{root}", "mask": {mask}, **sections}}), inventory)
print(json.dumps(resources.count_slots("CPU", 1)))
"""


def test_a_pipeline_is_planned_before_any_node_is_started(
    autoscaled, tmp_path
):  # the first test: the others start some
    write_sample(tmp_path / "sample", train_per_class=4, test_per_class=2)
    mask = {"detector": {"model": "sample", "weights": "sample"}}
    model = {"architecture": "resnet26-narrow", "image_size": 64}
    train = {"name": "first", "parent": "sample", "num_workers": 4, "model": model}
    for number, path in enumerate((tmp_path / "sample" / "photos").glob("*.jpg")):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    done = run(autoscaled, PLANNED.format(photos=tmp_path / "photos", root=tmp_path / "root", mask=mask, train=train))
    assert result(done) == 0
    assert "4 GPU(s)" in done.stdout
    assert "of the nodes that run now; more are started on demand" in " ".join(done.stdout.split())


UNPLACED = """
from carclass.cluster.tasks import run_tasks
resources.MAX_WAIT_S = 0.5
print(list(run_tasks(str, [1])))
"""


def test_tasks_for_which_no_node_starts_end_with_the_reason(autoscaled):  # the second test, for the same reason
    done = run(autoscaled, UNPLACED)
    assert "`a task` needs 1 CPU(s); they did not start within" in done.stderr


POOLED = """
import time
import ray.data
from carclass.cluster.actor_pools import plan_pool
try:
    resources.decide_gpus(None, 1, "key", "mask")
except UserError as error:
    assert "its GPU cannot be used" in str(error)  # the nodes' GPUs exist for Ray only
pool = plan_pool(None, 10_000, "mask", use_gpu=True, task_cpus=0.25)
class Work:
    def __call__(self, batch):
        time.sleep(1)
        return {"node": [ray.get_runtime_context().get_node_id()]}
rows = ray.data.range(60, override_num_blocks=60).map_batches(Work, batch_size=1, **pool.options())
used = {row["node"] for row in pool.configure(rows).iter_rows()}
labels = {node["NodeID"]: node["Labels"]["carclass-work"] for node in ray.nodes()}
print(json.dumps([pool.smallest, [labels[node] for node in used], sorted(set(labels.values()))]))
"""


def test_a_pool_gets_all_gpus_that_the_autoscaler_may_start_for_its_kind_of_work(autoscaled):  # the third
    done = run(autoscaled, POOLED)
    assert done.returncode == 0, done.stderr
    # The autoscaler's own lines may follow the result.
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("["))
    number, used, started = json.loads(line)
    assert number == 2
    assert used == ["mask", "mask"]
    assert {*started} - {"read"} == {"head", "mask"}  # another test may have started one that reads


PLACED = """
try:
    assert resources.decide_gpus(None, {count}, "key", "{work}")
except UserError as error:
    assert "its GPU cannot be used" in str(error)  # the nodes' GPUs exist for Ray only
@ray.remote(num_gpus=1, num_cpus=0, label_selector=resources.node_selector("{work}"))
def node_id():
    return ray.get_runtime_context().get_node_id()
labels = {{node["NodeID"]: node["Labels"]["carclass-work"] for node in ray.nodes()}}
print(json.dumps(labels[ray.get(node_id.remote())]))
"""


@pytest.mark.parametrize(("work", "count"), [("train", 2), ("mask", 2)])
def test_gpu_nodes_of_the_right_kind_are_started_for_a_job(autoscaled, work, count):
    assert result(run(autoscaled, PLACED.format(work=work, count=count))) == work


def test_cpus_are_started_for_a_job(autoscaled):
    code = 'resources.check_cpus(1, "key"); print(json.dumps(resources.count_slots("CPU", 1) >= 1))'
    assert result(run(autoscaled, code)) is True


def test_nodes_that_do_not_start_are_an_error_with_their_label(autoscaled):
    done = run(autoscaled, 'resources.MAX_WAIT_S = 3; resources.decide_gpus(True, 9, "train.use_gpu", "train")')
    assert "`train.use_gpu` needs 9 GPU(s) on nodes labelled carclass-work=train" in done.stderr


def test_a_job_with_use_gpu_false_waits_for_no_gpu(autoscaled):
    assert result(run(autoscaled, 'print(json.dumps(resources.decide_gpus(False, 9, "key", "train")))')) is False


CLASSIFIED = """
from carclass.config.schema import EvaluateSettings, PredictSettings
from carclass.data.dataset import load_dataset
from carclass.evaluation.classification import predict_split
from carclass.prediction.predict import predict_photos
source = load_dataset("{root}", "v1")
table = predict_split(source, EvaluateSettings(run="r", split="val"), "{model}", trained_on_gpu=False)
predicted = predict_photos("{root}", PredictSettings(run="r", photos="{photos}"))
print(json.dumps([len(table), predicted.counts.files]))
"""


def test_a_run_trained_without_gpus_is_evaluated_and_predicts_without(autoscaled, tmp_path):
    source = publish_photos(tmp_path)
    settings = TrainSettings(**runs.FROZEN, name="r", dataset="v1", use_gpu=False)
    trained = runs.begin(tmp_path, settings)
    runs.finish(trained, classes=source.classes)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "grey.jpg").write_bytes(photo.encode(np.full((48, 48, 3), 128, np.uint8)))
    code = CLASSIFIED.format(root=tmp_path, model=trained.model_uri("frozen"), photos=tmp_path / "new")
    assert result(run(autoscaled, code)) == [9, 1]  # with a GPU it would end: the nodes' GPUs exist for Ray only
