"""A simulated AWS account with an operator, whose SSH commands are recorded and always succeed."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import boto3
import pytest
from ray.autoscaler._private import commands
from ray.autoscaler._private.aws import node_provider, utils
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, FileConfigReader

from tests.helpers.faulty_s3 import Handler, Proxy

CLUSTER = Path(__file__).parents[2] / "cluster"
PREPARE, SPOT_FIRST = CLUSTER / "prepare_aws.py", CLUSTER / "image" / "spot_first.py"
IMAGE = f"123456789012.dkr.ecr.us-east-1.amazonaws.com/carclass@sha256:{'ab' * 32}"
AMI = "/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-default-x86_64"
Request = dict[str, str]


REFUSAL = "<Response><Errors><Error><Code>{}</Code><Message>refused</Message></Error></Errors></Response>"
DENIAL = "<ErrorResponse><Error><Code>AccessDenied</Code><Message>refused</Message></Error></ErrorResponse>"


class Recorder(Proxy):
    """Proxy of the simulated AWS that records requests with an action.

    no_spot: error code for spot requests. full_subnet: its zone has no capacity. denied: operation of IAM, or of a
    service with JSON such as ECR, for which the permission is missing.
    """

    def __init__(self, endpoint: str, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(endpoint, address)
        self.RequestHandlerClass = RecordingHandler
        self.requests: list[Request] = []
        self.no_spot: str | None = None
        self.full_subnet: str | None = None
        self.denied: str | None = None


class RefusedError(Exception):
    """A request that is answered with an error code instead of being forwarded."""


class DeniedError(Exception):
    """A request of IAM for which the permission is missing."""


class RecordingHandler(Handler):
    """A connection to the recorder."""

    server: Recorder

    def chunks(self) -> Iterator[bytes]:
        body = b"".join(super().chunks())
        if b"Action=" in body:
            self.server.requests.append(dict(parse_qsl(body.decode())))
        if self.server.denied and f"Action={self.server.denied}&".encode() in body:
            raise DeniedError
        if self.server.no_spot and b"MarketType=spot" in body:
            raise RefusedError(self.server.no_spot)
        if self.server.full_subnet and f"SubnetId={self.server.full_subnet}".encode() in body:
            raise RefusedError("InsufficientInstanceCapacity")
        yield body

    def do_POST(self) -> None:  # noqa: N802
        operation = self.headers.get("X-Amz-Target", "").rpartition(".")[2]
        if operation and operation == self.server.denied:
            b"".join(super().chunks())
            error = {"__type": "AccessDeniedException", "message": f"not authorized to perform: {operation}"}
            self.reply(400, {"Content-Type": "application/x-amz-json-1.1"}, json.dumps(error).encode())
            return
        try:
            self.answer()
        except DeniedError:
            self.reply(403, {"Content-Type": "text/xml"}, DENIAL.encode())
        except RefusedError as code:
            self.reply(500, {"Content-Type": "text/xml"}, REFUSAL.format(code).encode())


SSH = r"""#!/bin/bash
# A host on which every command succeeds, with an image but no container yet.
echo "ssh $*" >> "$HOME/commands"
while [[ $1 != *@* ]]; do shift; done; shift
bash -n <<< "$*" || exit 1
case "$*" in
    *"json .Config.Env"*) echo '["PATH=/usr/bin"]' ;;
    *"printenv HOME"*) echo /home/carclass ;;
    *State.Running*) echo false ;;
    *"command -v docker"*) echo /usr/bin/docker ;;
    *meminfo*) echo "MemAvailable: 1000000 kB" ;;
esac
"""
RSYNC = r"""#!/bin/bash
from=${*: -2:1} to=${*: -1}
echo "rsync $(stat -c %a "$from") to ${to#*:}" >> "$HOME/commands"
"""


class Account(NamedTuple):
    """The operator's home, the recorder of requests to AWS, private subnets in two zones and a public one."""

    home: Path
    recorder: Recorder
    subnet: str
    other: str
    public: str

    @property
    def file(self) -> str:
        """Path of the cluster's file for Ray."""
        return str(self.home / "build" / "aws.yaml")

    def prepare(self, *options: str, image: str = IMAGE, subnet: str = "") -> subprocess.CompletedProcess:
        """Run prepare_aws.py with options in place of the tests' own, or besides. subnet: before that of options."""
        words = ["--region", "us-east-1", "--ami", AMI, "--photos", "s3://my-bucket/photos"]
        words += ["--root", "s3://my-bucket/team/carclass", "--image", image]
        pairs = zip(words[::2], words[1::2], strict=True)
        defaults = [word for pair in pairs if pair[0] not in options for word in pair]
        return self.run(*defaults, "--subnet", subnet or self.subnet, *options)

    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        """Run prepare_aws.py with these options only, and further variables."""
        command = [sys.executable, PREPARE, *options]
        variables = {**os.environ, **environment}
        return subprocess.run(command, cwd=self.home, env=variables, capture_output=True, text=True, check=False)

    def created(self, region: str = "us-east-1") -> list[str]:
        """Return the names of a region's groups and keys, and of the account's budgets, roles and profiles."""
        ec2, iam = boto3.client("ec2", region_name=region), boto3.client("iam")
        names = [group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]]
        names += [key["KeyName"] for key in ec2.describe_key_pairs()["KeyPairs"]]
        names += [role["RoleName"] for role in iam.list_roles()["Roles"]]
        names += [profile["InstanceProfileName"] for profile in iam.list_instance_profiles()["InstanceProfiles"]]
        budgets = boto3.client("budgets").describe_budgets(AccountId="123456789012")["Budgets"]
        names += [budget["BudgetName"] for budget in budgets]
        return sorted(name for name in names if name.startswith("carclass"))

    def commands(self, text: str) -> list[str]:
        """Return the commands sent to nodes that contain a text."""
        return [line for line in (self.home / "commands").read_text().splitlines() if text in line]


def give_default_route(vpc: str, region: str = "us-east-1", **target: str) -> str:
    """Add a default route to the main route table of a VPC and return the table's id."""
    ec2 = boto3.client("ec2", region_name=region)
    (table,) = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["RouteTables"]
    ec2.create_route(RouteTableId=table["RouteTableId"], DestinationCidrBlock="0.0.0.0/0", **target)
    return str(table["RouteTableId"])


def put_image(image: str = IMAGE) -> None:
    """Put an image into ECR, in the registry's region, and its repository if it is missing."""
    registry, _, name = image.partition("/")
    repository, _, digest = name.partition("@")
    ecr = boto3.client("ecr", region_name=registry.split(".")[3])
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": {"digest": digest}})
    with suppress(ecr.exceptions.RepositoryAlreadyExistsException):
        ecr.create_repository(repositoryName=repository)
    with suppress(ecr.exceptions.ImageAlreadyExistsException):
        ecr.put_image(repositoryName=repository, imageManifest=manifest, imageTag=digest[-8:], imageDigest=digest)


@contextmanager
def make_account(home: Path) -> Iterator[Account]:
    """Create a bucket with a photo, an image, and a VPC with private subnets and a public one; clean up at the end."""
    for name, script in (("ssh", SSH), ("rsync", RSYNC)):
        (home / name).write_text(script)
        (home / name).chmod(0o755)
    recorder = Recorder(os.environ["AWS_ENDPOINT_URL"])
    threading.Thread(target=recorder.serve_forever, daemon=True).start()
    ec2 = boto3.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.9.{n}.0/24", AvailabilityZone=f"us-east-1{zone}")["Subnet"][
            "SubnetId"
        ]
        for n, zone in enumerate("aba")
    ]
    ec2.modify_subnet_attribute(SubnetId=subnets[2], MapPublicIpOnLaunch={"Value": True})
    nat = ec2.create_nat_gateway(SubnetId=subnets[2], AllocationId=ec2.allocate_address(Domain="vpc")["AllocationId"])
    give_default_route(vpc, NatGatewayId=nat["NatGateway"]["NatGatewayId"])
    boto3.client("s3").create_bucket(Bucket="my-bucket")
    boto3.client("s3").put_object(Bucket="my-bucket", Key="photos/a/1.jpg", Body=b"photo")
    put_image()
    account = Account(home, recorder, *subnets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{recorder.server_port}")
        patch.setenv("HOME", str(home))
        patch.setenv("PATH", f"{home}:{os.environ['PATH']}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(SPOT_FIRST.parent))
        patch.syspath_prepend(SPOT_FIRST.parent)
        patch.setattr(tempfile, "tempdir", str(home))  # Ray caches its configuration there between commands
        patch.setattr(node_provider, "TAG_BATCH_DELAY", 0)
        patch.setattr(commands, "POLL_INTERVAL", 0.1)
        yield account
        account.prepare("--remove").check_returncode()
    for cache in (utils.resource_cache, utils.client_cache):
        cache.cache_clear()
    recorder.shutdown()
    recorder.server_close()


def write_head_config(account: Account, config: dict[str, Any]) -> FileConfigReader:
    """Write the config and its files as `ray up` copies them to the head, for the head's provider."""
    provider = commands._get_node_provider(config["provider"], config["cluster_name"])
    _, copied = commands._set_up_config_for_head_node(config, provider, no_restart=False)
    file = account.home / "ray_bootstrap_config.yaml"
    file.write_text(Path(copied.name).read_text().replace('": "/home/carclass/', f'": "{account.home}/'))
    shutil.copytree(account.home / ".ray" / "carclass", account.home / ".ray" / "token")
    (account.home / "ray_bootstrap_key.pem").write_bytes((account.home / ".ssh" / "carclass.pem").read_bytes())
    subprocess.run([sys.executable, SPOT_FIRST, file], check=True)
    return FileConfigReader(str(file), skip_content_hash=True)


def make_provider(config: AutoscalingConfig) -> Any:
    """Return the node provider that Ray creates for a config."""
    return commands._get_node_provider(config.get_provider_config(), config.get_config("cluster_name"))
