"""cluster/kuberay.yaml: validation against the schemas of Kubernetes, KubeRay and Ray, without running them."""

import copy
import fnmatch
import json
import os
import re
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

from carclass.config import cli
from cluster import prepare_aws
from tests.helpers.clusters import RAY, Cluster

REPO = Path(__file__).parents[2]
VALUES = {
    "IMAGE": f"registry.example/carclass@sha256:{'0' * 64}",
    "BUCKET": "kuberay-test",
    "CODE_VERSION": "0123456789ab",
    "TLS": "1",
    "ROLE": "arn:aws:iam::123456789012:role/carclass-worker",
}
TEXT = (REPO / "cluster" / "kuberay.yaml").read_text(encoding="utf-8")
DOCUMENTS = {
    document["kind"]: document for document in yaml.safe_load_all(string.Template(TEXT).safe_substitute(VALUES))
}
JOB = DOCUMENTS["RayJob"]["spec"]
CLUSTER = JOB["rayClusterSpec"]
GROUPS = {"head": CLUSTER["headGroupSpec"], **{group["groupName"]: group for group in CLUSTER["workerGroupSpecs"]}}
PODS = {name: group["template"] for name, group in GROUPS.items()} | {"submitter": JOB["submitterPodTemplate"]}
RAYJOB = json.loads(Path(__file__).with_name("rayjob.schema.json").read_text(encoding="utf-8"))


def validate_for_kubernetes(document: dict[str, Any]) -> str:
    return kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def validate_for_kuberay(job: dict[str, Any]) -> None:
    jsonschema.validate(job, RAYJOB, jsonschema.Draft202012Validator)


@pytest.mark.parametrize("kind", [kind for kind in DOCUMENTS if kind != "RayJob"])
def test_objects_are_valid_for_kubernetes(kind: str):
    assert validate_for_kubernetes(DOCUMENTS[kind])


@pytest.mark.parametrize("pod", PODS)
def test_pods_are_valid_for_kubernetes(pod: str):
    assert validate_for_kubernetes({"apiVersion": "v1", "kind": "Pod", **PODS[pod]})


def test_the_autoscalers_container_is_valid_for_kubernetes():
    options = {
        key: CLUSTER["autoscalerOptions"][key] for key in ("resources", "securityContext", "env", "volumeMounts")
    }
    container = {"name": "autoscaler", "image": VALUES["IMAGE"], **options}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "head"}, "spec": {"containers": [container]}}
    assert validate_for_kubernetes(pod)


def test_the_job_is_valid_for_kuberay():
    validate_for_kuberay(DOCUMENTS["RayJob"])


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
def test_kuberays_schema_rejects_a_mistake(field: str):
    job = copy.deepcopy(DOCUMENTS["RayJob"])
    *path, name = field.split(".")
    parent = job["spec"]
    for key in path:
        parent = parent[key]
    parent[name], message = MISTAKES[field]
    with pytest.raises(jsonschema.ValidationError, match=message):
        validate_for_kuberay(job)


def test_kubernetes_schema_rejects_a_mistake_in_a_pod():
    pod = copy.deepcopy(PODS["mask"])
    pod["spec"]["containers"][0]["securityContext"]["privilege"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        validate_for_kubernetes({"apiVersion": "v1", "kind": "Pod", **pod})


def containers() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield each container's name, security context and pod's; KubeRay adds the autoscaler's to the head."""
    for name, pod in PODS.items():
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            yield f"{name}/{container['name']}", container.get("securityContext", {}), pod["spec"]["securityContext"]
    options = CLUSTER["autoscalerOptions"]
    yield "head/autoscaler", options["securityContext"], PODS["head"]["spec"]["securityContext"]


def test_the_namespace_admits_only_restricted_pods():
    assert DOCUMENTS["Namespace"]["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    namespaces = {each["metadata"].get("namespace") for kind, each in DOCUMENTS.items() if kind != "Namespace"}
    assert namespaces == {DOCUMENTS["Namespace"]["metadata"]["name"]}


@pytest.mark.parametrize(("own", "pods"), [context[1:] for context in containers()], ids=[c[0] for c in containers()])
def test_a_container_is_restricted(own: dict[str, Any], pods: dict[str, Any]):
    """Rules: https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted."""
    assert own == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pods["runAsNonRoot"] is True
    assert pods["runAsUser"] == 1000
    assert pods["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_shares_nothing_with_its_host(pod: str):
    spec = PODS[pod]["spec"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert [volume for volume in spec.get("volumes", []) if not {"emptyDir", "secret"} & set(volume)] == []
    assert [port for each in spec["containers"] for port in each.get("ports", []) if "hostPort" in port] == []


@pytest.mark.parametrize("pod", PODS)
def test_a_pod_runs_the_pinned_image(pod: str):
    containers = [*PODS[pod]["spec"]["containers"], *PODS[pod]["spec"].get("initContainers", [])]
    assert {container["image"] for container in containers} == {VALUES["IMAGE"]}


def test_the_cluster_requires_a_token():
    assert CLUSTER["authOptions"] == {"mode": "token"}


def test_the_cluster_names_the_installed_version_of_ray():
    """KubeRay creates tokens from Ray 2.52 on, and refuses token clusters without a version."""
    assert CLUSTER["rayVersion"] == ray.__version__


@pytest.mark.parametrize("group", GROUPS)
def test_a_pod_makes_its_certificate_for_its_own_names_where_ray_reads_it(group: str):
    spec = PODS[group]["spec"]
    (maker,), (node,) = spec["initContainers"], spec["containers"]
    environ = {each["name"]: each["value"] for each in node["env"]}
    assert maker["env"] == node["env"] == CLUSTER["autoscalerOptions"]["env"]
    assert environ["RAY_USE_TLS"] == VALUES["TLS"]
    assert {Path(path).parent for name, path in environ.items() if name.startswith("RAY_TLS_")} == {Path("/tls")}
    mount = {"name": "tls", "mountPath": "/tls"}
    for container in (maker, node, CLUSTER["autoscalerOptions"]):
        assert mount in container["volumeMounts"]
    namespace = DOCUMENTS["Namespace"]["metadata"]["name"]
    script = ["python", "/opt/carclass/bin/certificates.py", "node", "/authority"]
    assert maker["command"] == [*script, f"*.{namespace}.svc.cluster.local"]  # KubeRay: <cluster>-head-svc


@pytest.mark.parametrize("group", GROUPS)
def test_only_the_init_container_gets_the_authoritys_key(group: str):
    spec = PODS[group]["spec"]
    (name,) = (volume["name"] for volume in spec["volumes"] if "secret" in volume)
    (maker,) = spec["initContainers"]
    assert {"name": name, "mountPath": "/authority", "readOnly": True} in maker["volumeMounts"]
    others = [*spec["containers"], CLUSTER["autoscalerOptions"]]
    assert name not in {mount["name"] for each in others for mount in each["volumeMounts"]}


@pytest.mark.parametrize("group", GROUPS)
def test_a_node_is_never_restarted(group: str):
    """KubeRay requires this with the autoscaler v2, which replaces nodes itself."""
    assert PODS[group]["spec"].get("restartPolicy", "Never") == "Never"


@pytest.mark.parametrize("group", [name for name in GROUPS if name != "head"])
def test_a_group_scales_with_the_work(group: str):
    assert 0 == GROUPS[group]["minReplicas"] < GROUPS[group]["maxReplicas"]


def test_the_cluster_ends_with_its_job():
    assert JOB["shutdownAfterJobFinishes"] is True
    assert JOB["ttlSecondsAfterFinished"] <= 3600
    assert JOB["activeDeadlineSeconds"] > 0


def test_only_the_head_can_call_kubernetes():
    with_token = [name for name, pod in PODS.items() if pod["spec"].get("automountServiceAccountToken", True)]
    assert with_token == ["head"]


def test_the_job_api_is_open_to_operator_and_submitter_only():
    policy = DOCUMENTS["NetworkPolicy"]["spec"]
    nodes, clients = policy["ingress"]
    assert policy["podSelector"] == {}
    assert nodes == {"from": [{"podSelector": {"matchLabels": PODS["head"]["metadata"]["labels"]}}]}
    assert clients["ports"] == [{"protocol": "TCP", "port": 8265}]
    submitter, operator = clients["from"]
    assert submitter == {"podSelector": {"matchLabels": PODS["submitter"]["metadata"]["labels"]}}
    assert set(operator) == {"namespaceSelector", "podSelector"}  # in one entry: both must match


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_has_its_own_nodes_and_labels(group: str):
    assert PODS[group]["spec"]["nodeSelector"]["node.kubernetes.io/instance-type"]
    assert GROUPS[group]["labels"]["carclass-work"] == group
    assert float(GROUPS[group]["labels"]["usd-per-hour"]) > 0
    assert PODS[group]["metadata"]["labels"] == PODS["head"]["metadata"]["labels"]


def test_the_largest_number_of_nodes_for_masking_is_on_their_label():
    assert int(GROUPS["mask"]["labels"]["carclass-max-nodes"]) == GROUPS["mask"]["maxReplicas"]


@pytest.mark.parametrize("group", ["mask", "train"])
def test_a_group_with_gpus_tolerates_their_taint(group: str):
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in PODS[group]["spec"]["tolerations"]


@pytest.mark.parametrize("group", GROUPS)
def test_an_object_store_fits_its_container(group: str):
    volume = PODS[group]["spec"]["volumes"][0]
    (container,) = PODS[group]["spec"]["containers"]
    share = int(volume["emptyDir"]["sizeLimit"][:-2]) / int(container["resources"]["limits"]["memory"][:-2])
    assert volume["emptyDir"]["medium"] == "Memory"
    assert {"name": volume["name"], "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert 0.3 < share < 0.4  # Ray takes three tenths of the memory


@pytest.mark.parametrize("group", GROUPS)
def test_rays_files_have_a_volume_within_the_pods_disk(group: str):
    """KubeRay mounts its own volume of this name, without a limit, where there is none."""
    volume = PODS[group]["spec"]["volumes"][1]
    (container,) = PODS[group]["spec"]["containers"]
    assert {"name": "ray-logs", "mountPath": "/tmp/ray"} in container["volumeMounts"]
    assert volume["name"] == "ray-logs"
    disk = {container["resources"][kind]["ephemeral-storage"] for kind in ("requests", "limits")}
    assert disk == {"50Gi"}
    assert int(volume["emptyDir"]["sizeLimit"][:-2]) < 50


def test_nodes_are_not_moved_while_the_head_works_on_them():
    assert PODS["head"]["metadata"]["annotations"] == {"karpenter.sh/do-not-disrupt": "true"}


def test_pods_do_not_reach_the_credentials_of_their_nodes():
    policy = DOCUMENTS["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    blocks = [target["ipBlock"] for rule in policy["egress"] for target in rule["to"]]
    excluded = {"0.0.0.0/0": ["169.254.169.254/32"], "::/0": ["fd00:ec2::254/128"]}
    assert {block["cidr"]: block["except"] for block in blocks} == excluded


def test_the_job_ends_in_time_for_the_largest_estimate():
    hours = [float(text) for text in re.findall(r"\*\*([\d.]+) h, ", (REPO / "docs" / "cost.md").read_text())]
    assert max(hours) < JOB["activeDeadlineSeconds"] / 3600 < 2 * max(hours)


def test_code_and_results_lie_below_the_prefix_that_the_role_may_write():
    values = prepare_aws.storage_values(f"s3://{VALUES['BUCKET']}/photos", f"s3://{VALUES['BUCKET']}/carclass")
    allowed = [f"s3://{VALUES['BUCKET']}/{values[name]}" for name in ("PHOTOS", "ROOT")]
    runtime = yaml.safe_load(JOB["runtimeEnvYAML"])
    uris = [runtime["working_dir"], *(uri for uri in runtime["env_vars"].values() if uri.startswith("s3://"))]
    assert len(uris) == 3
    assert [uri for uri in uris if not any(fnmatch.fnmatch(f"{uri}/", pattern) for pattern in allowed)] == []


def test_the_jobs_config_trains_all_photos_in_both_stages(monkeypatch: pytest.MonkeyPatch):
    for name, value in yaml.safe_load(JOB["runtimeEnvYAML"])["env_vars"].items():
        monkeypatch.setenv(name, value)
    settings = cli.parse_job("", None, JOB["entrypoint"].split()[2:])
    assert settings.mask is not None
    assert settings.train is not None
    assert settings.mask.limit is None
    assert None not in (settings.train.frozen, settings.train.unfrozen)
    assert settings.mask.num_actors == GROUPS["mask"]["maxReplicas"]
    limits = PODS["train"]["spec"]["containers"][0]["resources"]["limits"]
    assert settings.train.num_workers == limits["nvidia.com/gpu"]


def test_rays_autoscaler_reads_each_groups_resources():
    """With Ray's own parser of the cluster's object."""
    cluster = {"metadata": {"name": "carclass-x", "namespace": "carclass"}, "spec": CLUSTER}
    types = autoscaling_config._derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    sizes = {name: (each["resources"]["CPU"], each["resources"].get("GPU", 0)) for name, each in types.items()}
    assert sizes == {"headgroup": (0, 0), "read": (15, 0), "mask": (3, 1), "train": (46, 4)}
    assert [each["labels"]["carclass-work"] for each in types.values()] == list(GROUPS)


@pytest.fixture
def submitted(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.CompletedProcess[str]]:
    """Run the job's --help on a cluster that gets the code as in the manifest."""
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
def test_code_is_downloaded_as_a_zip_from_s3(submitted: subprocess.CompletedProcess[str]):
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "The whole chain from one config file" in submitted.stdout
