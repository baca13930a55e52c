"""cluster/aws.yaml: requests of Ray's launcher and autoscaler to AWS, and commands on the nodes."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
import yaml
from ray.autoscaler import sdk
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter
from ray.autoscaler.v2.instance_manager.ray_installer import RayInstaller
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.core.generated.instance_manager_pb2 import Instance

from tests.helpers.aws import IMAGE, Account, Request, make_account, make_provider, write_head_config

REPO = Path(__file__).parents[2]
WORKERS = ("mask", "read", "train")
TYPES = ("head", *WORKERS)


@pytest.fixture(scope="module")
def account(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    with make_account(tmp_path_factory.mktemp("home")) as account:
        yield account


class Launched(NamedTuple):
    """A cluster with a node of every type, and the requests to AWS by operator and head."""

    account: Account
    autoscaling: AutoscalingConfig
    by_operator: list[Request]
    by_head: list[Request]

    @property
    def launches(self) -> dict[str, Request]:
        """Return the requests that launched nodes, by node type."""
        launches = [each for each in self.by_operator + self.by_head if each["Action"] == "RunInstances"]
        return {tags(request)["ray-user-node-type"]: request for request in launches}


def tags(request: Request) -> dict[str, str]:
    keys = [key for key in request if re.fullmatch(r"TagSpecification\.1\.Tag\.\d+\.Key", key)]
    return {request[key]: request[key.replace("Key", "Value")] for key in keys}


@pytest.fixture(scope="module")
def launched(account: Account) -> Launched:
    """Run `ray up`, launch and set up a node of every other type as the head's autoscaler does, then tear down."""
    assert account.prepare().returncode == 0
    account.recorder.requests.clear()
    config = sdk.create_or_update_cluster(account.file)
    by_operator = [*account.recorder.requests]
    account.recorder.requests.clear()

    reader = write_head_config(account, config)
    autoscaling = reader.get_cached_autoscaling_config()
    provider = make_provider(autoscaling)
    adapter = NodeProviderAdapter(provider, reader)
    adapter.launch(dict.fromkeys(WORKERS, 1), "a request")
    adapter._main_executor.shutdown()
    adapter._node_launcher_executors.shutdown()
    assert adapter.poll_errors() == []
    nodes = adapter.get_non_terminated().values()
    for node in (node for node in nodes if node.node_type in ("mask", "read")):
        instance = Instance(instance_type=node.node_type, cloud_instance_id=node.cloud_instance_id)
        RayInstaller(provider, autoscaling).install_ray(instance, "10.9.0.9")
    provider.terminate_nodes([node.cloud_instance_id for node in nodes if node.node_type == "read"])
    by_head = [*account.recorder.requests]
    account.recorder.requests.clear()

    sdk.teardown_cluster(account.file)
    return Launched(account, autoscaling, [*by_operator, *account.recorder.requests], by_head)


def test_the_file_passes_rays_schema():
    config = prepare_config(yaml.safe_load((REPO / "cluster" / "aws.yaml").read_text()))
    validate_config(config)


def test_a_node_of_every_type_is_launched(launched: Launched):
    assert sorted(launched.launches) == ["head", *WORKERS]


@pytest.mark.parametrize("kind", TYPES)
def test_no_node_gets_a_public_address(launched: Launched, kind: str):
    request = launched.launches[kind]
    interfaces = {key: value for key, value in request.items() if key.startswith("NetworkInterface.")}
    assert {key.split(".")[1] for key in interfaces} == {"1"}
    assert interfaces["NetworkInterface.1.AssociatePublicIpAddress"] == "false"
    assert interfaces["NetworkInterface.1.SubnetId"] == launched.account.subnet
    assert "SubnetId" not in request


@pytest.mark.parametrize("kind", TYPES)
def test_metadata_requires_imdsv2_and_is_limited_to_the_host(launched: Launched, kind: str):
    request = launched.launches[kind]
    assert request["MetadataOptions.HttpTokens"] == "required"
    assert request["MetadataOptions.HttpPutResponseHopLimit"] == "1"


@pytest.mark.parametrize("kind", TYPES)
def test_disks_are_encrypted_and_deleted_with_the_node(launched: Launched, kind: str):
    disks = {key: value for key, value in launched.launches[kind].items() if key.startswith("BlockDeviceMapping.")}
    assert {key.split(".")[1] for key in disks} == {"1"}
    assert disks["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
    assert disks["BlockDeviceMapping.1.Ebs.DeleteOnTermination"] == "true"


@pytest.mark.parametrize("kind", TYPES)
def test_head_and_workers_have_separate_roles(launched: Launched, kind: str):
    profile = "carclass-head" if kind == "head" else "carclass-worker"
    assert launched.launches[kind]["IamInstanceProfile.Name"] == profile
    (role,) = boto3.client("iam").get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"]
    assert role["RoleName"] == profile


@pytest.mark.parametrize("kind", TYPES)
def test_all_nodes_but_the_head_are_spot(launched: Launched, kind: str):
    spot = launched.launches[kind].get("InstanceMarketOptions.MarketType") == "spot"
    assert spot == (kind != "head")


def test_only_nodes_may_connect_to_nodes(launched: Launched):
    named = {
        value for request in launched.launches.values() for key, value in request.items() if "SecurityGroup" in key
    }
    (group,) = boto3.client("ec2").describe_security_groups(GroupIds=sorted(named))["SecurityGroups"]
    (rule,) = group["IpPermissions"]
    assert [pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == [group["GroupId"]]
    assert [rule["IpRanges"], rule["Ipv6Ranges"], rule["PrefixListIds"]] == [[], [], []]


def test_ray_creates_no_group_role_or_key_itself(launched: Launched):
    ec2, iam = boto3.client("ec2"), boto3.client("iam")
    names = [group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]]
    names += [key["KeyName"] for key in ec2.describe_key_pairs()["KeyPairs"]]
    names += [role["RoleName"] for role in iam.list_roles()["Roles"]]
    names += [profile["InstanceProfileName"] for profile in iam.list_instance_profiles()["InstanceProfiles"]]
    assert [name for name in names if "ray-autoscaler" in name] == []


@pytest.mark.parametrize(("side", "policy"), [("by_operator", "operator"), ("by_head", "head")])
def test_the_policies_allow_exactly_the_requests_of_ray_to_ec2(launched: Launched, side: str, policy: str):
    iam = boto3.client("iam")
    document = iam.get_role_policy(RoleName=f"carclass-{policy}", PolicyName=policy)["PolicyDocument"]
    actions = [action for each in document["Statement"] for action in as_list(each["Action"])]
    requested = {f"ec2:{request['Action']}" for request in getattr(launched, side)}
    assert requested == {action for action in actions if action.startswith("ec2:")}


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def test_operators_reach_the_head_through_systems_manager_and_the_head_its_workers_directly(launched: Launched):
    lines = launched.account.commands("ubuntu@")
    from_outside = [line for line in lines if "ubuntu@i-" in line]
    assert all("ProxyCommand=aws ssm start-session" in line for line in from_outside)
    inside = [line for line in lines if "ubuntu@10.9.0." in line]
    assert all("ProxyCommand" not in line for line in inside)
    assert len(from_outside) > 0 < len(inside)


def test_every_node_gets_the_folder_of_the_token_readable_by_its_owner_only(launched: Launched):
    folder = "/home/carclass/.ray/token"
    copies = [line.split()[1] for line in launched.account.commands("rsync") if line.endswith("/.ray/token/")]
    assert copies == ["700"] * 3
    for line in launched.account.commands("docker run"):
        assert f"{folder}:{folder}" in line
        assert f"RAY_AUTH_MODE=token --env=RAY_AUTH_TOKEN_PATH={folder}/auth_token" in line
    assert all(f"chmod 600 {folder}/auth_token && " in line for line in launched.account.commands("ray start"))


def test_every_node_makes_its_certificate_before_ray_starts(launched: Launched):
    environ = launched.autoscaling.get_docker_config("head")["run_options"]
    files = {option.partition("=")[2].partition("=")[2] for option in environ if option.startswith("--env=RAY_TLS_")}
    assert {Path(file).parent for file in files} == {Path("/home/carclass/.ray/tls")}
    starts = launched.account.commands("ray start")
    assert all(
        " && python /opt/carclass/bin/certificates.py node /home/carclass/.ray/token && " in line for line in starts
    )
    assert all("--env=RAY_USE_TLS=0 " in line for line in launched.account.commands("docker run"))


def test_tls_is_an_option_that_puts_an_authority_beside_the_token(account: Account):
    assert account.prepare("--tls").returncode == 0
    assert "--env=RAY_USE_TLS=1" in yaml.safe_load(Path(account.file).read_text())["docker"]["run_options"]
    files = {path.name: path.stat().st_mode & 0o777 for path in (account.home / ".ray" / "carclass").iterdir()}
    assert files == dict.fromkeys(("auth_token", "ca.crt", "ca.key"), 0o600)


def test_tls_stays_on_without_the_option_and_the_output_tells(account: Account):
    assert account.prepare("--tls").returncode == 0
    again = account.prepare()
    assert "--env=RAY_USE_TLS=1" in yaml.safe_load(Path(account.file).read_text())["docker"]["run_options"]
    assert "TLS between nodes stays on" in again.stdout
    for file in (account.home / ".ray" / "carclass").glob("ca.*"):  # as the output says
        file.unlink()
    assert "TLS" not in account.prepare().stdout
    assert "--env=RAY_USE_TLS=0" in yaml.safe_load(Path(account.file).read_text())["docker"]["run_options"]


def test_nodes_run_the_image_by_digest_and_install_nothing(launched: Launched):
    assert len(pulls := launched.account.commands("docker pull")) == 3
    assert len(runs := launched.account.commands("docker run")) == 3
    assert all(IMAGE in line for line in pulls + runs)
    assert [line for word in ("pip ", "wheel", "apt-get", "conda") for line in launched.account.commands(word)] == []


def test_the_head_launches_workers_with_the_spot_first_provider(launched: Launched):
    (line,) = launched.account.commands("ray start --head")
    named = "python /opt/carclass/bin/spot_first.py /home/carclass/ray_bootstrap_config.yaml"
    assert f"{named} && RAY_USAGE_STATS_ENABLED=0 PYTHONPATH=/opt/carclass/bin ray start" in line


def test_the_dashboard_listens_on_loopback(launched: Launched):
    (line,) = launched.account.commands("ray start --head")
    assert "--dashboard-host=127.0.0.1" in line
    assert launched.account.commands("0.0.0.0") == []


def test_nodes_have_labels_with_work_and_price(launched: Launched):
    types = launched.autoscaling.get_node_type_configs()
    work = {name: each.labels["carclass-work"] for name, each in types.items()}
    assert work == {kind: kind for kind in TYPES}
    assert all(float(each.labels["usd-per-hour"]) > 0 for each in types.values())
    assert int(types["mask"].labels["carclass-max-nodes"]) == types["mask"].max_worker_nodes
    for name in ("head", "mask", "read"):
        assert f'"carclass-work":"{name}","usd-per-hour":"' in "".join(launched.account.commands("ray start"))


def test_only_gpu_nodes_pass_gpus_to_their_container(launched: Launched):
    options = {kind: launched.autoscaling.get_docker_config(kind).get("worker_run_options", []) for kind in TYPES}
    assert [kind for kind in TYPES if "--gpus=all" in options[kind]] == ["mask", "train"]
    assert len(launched.account.commands("--gpus=all")) == 1  # of a head, a node for masking and one for reading


def test_workers_watch_for_spot_interruptions(launched: Launched):
    lines = launched.account.commands("ray start --address=$RAY_HEAD_IP:6379")
    assert len(lines) == 2
    assert all("setsid --fork python /opt/carclass/bin/watch_spot.py $RAY_HEAD_IP:6379" in line for line in lines)


@pytest.mark.parametrize(("work", "resources"), [("read", {"CPU": 16}), ("mask", {"GPU": 1}), ("train", {"GPU": 4})])
def test_every_kind_of_work_has_its_own_nodes(launched: Launched, work: str, resources: dict[str, float]):
    selector = [[("carclass-work", LabelSelectorOperator.LABEL_OPERATOR_IN, [work])]]
    requests = [ResourceRequestUtil.make(resources, label_selectors=selector) for _ in range(2)]
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=launched.autoscaling.get_node_type_configs(),
        max_num_nodes=launched.autoscaling.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(requests),
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert {each.instance_type: each.count for each in reply.to_launch if each.instance_type != "head"} == {work: 2}
