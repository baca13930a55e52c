"""cluster/kuberay.yaml: what Kubernetes, KubeRay and Ray each read in it, without any of the three running."""

import copy
import json
import os
import shutil
import string
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config

from tests.helpers.clusters import RAY, Cluster

REPO = Path(__file__).parents[2]
VALUES = {
    "IMAGE": f"registry.example/carclass@sha256:{'0' * 64}",
    "BUCKET": "kuberay-test",
    "ROLE": "arn:aws:iam::123456789012:role/carclass-worker",
}
TEXT = (REPO / "cluster" / "kuberay.yaml").read_text(encoding="utf-8")
DOCUMENTS = {one["kind"]: one for one in yaml.safe_load_all(string.Template(TEXT).safe_substitute(VALUES))}
JOB = DOCUMENTS["RayJob"]["spec"]
CLUSTER = JOB["rayClusterSpec"]
GROUPS = {"head": CLUSTER["headGroupSpec"], **{one["groupName"]: one for one in CLUSTER["workerGroupSpecs"]}}
PODS = {name: group["template"] for name, group in GROUPS.items()} | {"submitter": JOB["submitterPodTemplate"]}
RAYJOB = json.loads(Path(__file__).with_name("rayjob.schema.json").read_text(encoding="utf-8"))


def kubernetes_takes(document: dict[str, Any]) -> str:
    return kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def kuberay_takes(job: dict[str, Any]) -> None:
    jsonschema.validate(job, RAYJOB, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("kind", [kind for kind in DOCUMENTS if kind != "RayJob"])
def test_kubernetes_takes_each_object(kind: str):
    assert kubernetes_takes(DOCUMENTS[kind])


@pytest.mark.parametrize("pod", PODS)
def test_kubernetes_takes_each_pod(pod: str):
    assert kubernetes_takes({"apiVersion": "v1", "kind": "Pod", **PODS[pod]})


def test_kubernetes_takes_the_autoscalers_container():
    given = {key: CLUSTER["autoscalerOptions"][key] for key in ("resources", "securityContext")}
    container = {"name": "autoscaler", "image": VALUES["IMAGE"], **given}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "head"}, "spec": {"containers": [container]}}
    assert kubernetes_takes(pod)


def test_kuberay_takes_the_job():
    kuberay_takes(DOCUMENTS["RayJob"])


MISTAKES = {
    "shutdownAfterFinish": (True, "unexpected"),
    "backoffLimit": ("2", "is not of type 'integer'"),
    "rayClusterSpec.authOptions.mode": ("password", "is not one of"),
    "rayClusterSpec.autoscalerOptions.version": ("v3", "is not one of"),
    "rayClusterSpec.headGroupSpec.labels.usd-per-hour": (0.2, "is not of type 'string'"),
    "rayClusterSpec.headGroupSpec.rayStartParams.num-cpus": (0, "is not of type 'string'"),
    "rayClusterSpec.headGroupSpec.rayStartParams.labels": ("carclass-work=head", "should not be valid"),
    "rayClusterSpec.headGroupSpec.template": (None, "is not of type 'object'"),
}


@pytest.mark.parametrize("field", MISTAKES)
def test_kuberays_schema_refuses_a_mistake(field: str):
    job = copy.deepcopy(DOCUMENTS["RayJob"])
    *path, name = field.split(".")
    place = job["spec"]
    for key in path:
        place = place[key]
    place[name], complaint = MISTAKES[field]
    with pytest.raises(jsonschema.ValidationError, match=complaint):
        kuberay_takes(job)


def test_kubernetes_refuses_a_mistake_in_a_pod():
    pod = copy.deepcopy(PODS["mask"])
    pod["spec"]["containers"][0]["securityContext"]["privilege"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_takes({"apiVersion": "v1", "kind": "Pod", **pod})


def containers() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each container's name, own security context and pod's; KubeRay adds the autoscaler's to the head."""
    for name, pod in PODS.items():
        for one in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            yield f"{name}/{one['name']}", one.get("securityContext", {}), pod["spec"]["securityContext"]
    options = CLUSTER["autoscalerOptions"]
    yield "head/autoscaler", options["securityContext"], PODS["head"]["spec"]["securityContext"]


def test_the_namespace_admits_only_restricted_pods():
    assert DOCUMENTS["Namespace"]["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    namespaces = {one["metadata"].get("namespace") for kind, one in DOCUMENTS.items() if kind != "Namespace"}
    assert namespaces == {DOCUMENTS["Namespace"]["metadata"]["name"]}


@pytest.mark.parametrize(("own", "pods"), [context[1:] for context in containers()], ids=[c[0] for c in containers()])
def test_a_container_is_restricted(own: dict[str, Any], pods: dict[str, Any]):
    """The rules: https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted."""
    assert own == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pods["runAsNonRoot"] is True
    assert pods["runAsUser"] == 1000
    assert pods["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_shares_nothing_with_its_machine(pod: str):
    spec = PODS[pod]["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert [volume for volume in spec.get("volumes", []) if "emptyDir" not in volume] == []
    assert [port for one in spec["containers"] for port in one.get("ports", []) if "hostPort" in port] == []


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_runs_the_pinned_image(pod: str):
    assert [one["image"] for one in PODS[pod]["spec"]["containers"]] == [VALUES["IMAGE"]]


def test_the_cluster_asks_for_a_token():
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_the_operator_is_told_the_version_of_ray():
    """It gives out tokens from 2.52 on, and refuses a cluster whose version it isn't told."""
    assert CLUSTER["rayVersion"] == ray.__version__


@pytest.mark.parametrize("group", GROUPS)
def test_a_node_is_not_started_again_in_its_place(group: str):
    """The operator refuses anything else with this autoscaler, which replaces nodes itself."""
    assert PODS[group]["spec"].get("restartPolicy", "Never") == "Never"


@pytest.mark.parametrize("group", [name for name in GROUPS if name != "head"])
def test_a_group_comes_and_goes_with_the_work(group: str):
    assert 0 == GROUPS[group]["minReplicas"] < GROUPS[group]["maxReplicas"]


def test_the_cluster_ends_with_its_job():
    assert JOB["shutdownAfterJobFinishes"] is True
    assert JOB["ttlSecondsAfterFinished"] <= 3600
    assert JOB["activeDeadlineSeconds"] > 0


def test_only_the_head_can_speak_to_kubernetes():
    asks = [name for name, pod in PODS.items() if pod["spec"].get("automountServiceAccountToken", True)]
    assert asks == ["head"]


def test_the_job_api_is_open_to_the_operator_and_the_submitter_alone():
    policy = DOCUMENTS["NetworkPolicy"]["spec"]
    nodes, guests = policy["ingress"]
    assert policy["podSelector"] == {}
    assert nodes == {"from": [{"podSelector": {"matchLabels": PODS["head"]["metadata"]["labels"]}}]}
    assert guests["ports"] == [{"protocol": "TCP", "port": 8265}]
    submitter, operator = guests["from"]
    assert submitter == {"podSelector": {"matchLabels": PODS["submitter"]["metadata"]["labels"]}}
    assert set(operator) == {"namespaceSelector", "podSelector"}  # in one entry: both must hold


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_has_nodes_and_labels_of_its_own(group: str):
    assert PODS[group]["spec"]["nodeSelector"]["node.kubernetes.io/instance-type"]
    assert GROUPS[group]["labels"]["carclass-work"] == group
    assert float(GROUPS[group]["labels"]["usd-per-hour"]) > 0
    assert PODS[group]["metadata"]["labels"] == PODS["head"]["metadata"]["labels"]


@pytest.mark.parametrize("group", ["mask", "train"])
def test_a_group_with_gpus_tolerates_their_taint(group: str):
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in PODS[group]["spec"]["tolerations"]


@pytest.mark.parametrize("group", GROUPS)
def test_an_object_store_fits_its_container(group: str):
    (volume,) = PODS[group]["spec"]["volumes"]
    (container,) = PODS[group]["spec"]["containers"]
    share = int(volume["emptyDir"]["sizeLimit"][:-2]) / int(container["resources"]["limits"]["memory"][:-2])
    assert volume["emptyDir"]["medium"] == "Memory"
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
    assert 0.3 < share < 0.4  # Ray takes three tenths of the memory


def test_rays_autoscaler_sees_each_groups_resources():
    """By Ray's own reading of the cluster's object."""
    named = {"metadata": {"name": "carclass-x", "namespace": "carclass"}, "spec": CLUSTER}
    types = autoscaling_config._derive_autoscaling_config_from_ray_cr(named)["available_node_types"]
    found = {name: (one["resources"]["CPU"], one["resources"].get("GPU", 0)) for name, one in types.items()}
    assert found == {"headgroup": (0, 0), "read": (15, 0), "mask": (3, 1), "train": (46, 4)}
    assert [one["labels"]["carclass-work"] for one in types.values()] == list(GROUPS)


@pytest.fixture
def arrived(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.CompletedProcess[str]]:
    """What the job's own help prints on a cluster that has the code as the manifest says."""
    runtime = yaml.safe_load(JOB["runtimeEnvYAML"])
    bucket, _, key = runtime["working_dir"].removeprefix("s3://").partition("/")
    archive = tmp_path / "carclass.zip"
    subprocess.run(
        ["git", "archive", "--format=zip", "--prefix=carclass/", "-o", archive, "HEAD"], cwd=REPO, check=True
    )
    s3.create_bucket(Bucket=bucket)
    s3.upload_file(str(archive), bucket, key)
    monkeypatch.setenv("PATH", f"{RAY.parent}:{os.environ['PATH']}")  # the head's `python` is the job's
    cluster = Cluster(tmp_path, dashboard=True)
    script = ["python", JOB["entrypoint"].split()[1], "--help"]
    command = [RAY, "job", "submit", "--runtime-env-json", json.dumps(runtime), "--", *script]
    try:
        yield subprocess.run(
            command, env=cluster.environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
    finally:
        cluster.stop()


@pytest.mark.slow  # 20 s
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_arrives_as_a_zip_from_s3(arrived: subprocess.CompletedProcess[str]):
    assert arrived.returncode == 0, arrived.stdout + arrived.stderr
    assert "The whole chain from one file" in arrived.stdout
