"""A simulated AWS account with an operator, whose SSH commands are recorded and always succeed."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


class Recorder(Proxy):
    """Proxy of the simulated AWS that records requests with an action.

    no_spot: error code for spot requests. full_subnet: its zone has no capacity.
    """

    def __init__(self, endpoint: str, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        super().__init__(endpoint, address)
        self.RequestHandlerClass = RecordingHandler
        self.requests: list[Request] = []
        self.no_spot: str | None = None
        self.full_subnet: str | None = None


class RefusedError(Exception):
    """A request that is answered with an error code instead of being forwarded."""


class RecordingHandler(Handler):
    """A connection to the recorder."""

    server: Recorder

    def chunks(self) -> Iterator[bytes]:
        body = b"".join(super().chunks())
        if b"Action=" in body:
            self.server.requests.append(dict(parse_qsl(body.decode())))
        if self.server.no_spot and b"MarketType=spot" in body:
            raise RefusedError(self.server.no_spot)
        if self.server.full_subnet and f"SubnetId={self.server.full_subnet}".encode() in body:
            raise RefusedError("InsufficientInstanceCapacity")
        yield body

    def do_POST(self) -> None:  # noqa: N802
        try:
            self.answer()
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
        """Run prepare_aws.py. subnet: in place of the private one."""
        command = [sys.executable, PREPARE, "--region", "us-east-1", "--ami", AMI]
        command += ["--photos", "s3://my-bucket/photos", "--root", "s3://my-bucket/team/carclass", "--image", image]
        command += ["--subnet", subnet or self.subnet, *options]
        return subprocess.run(command, cwd=self.home, capture_output=True, text=True, check=False)

    def commands(self, text: str) -> list[str]:
        """Return the commands sent to nodes that contain a text."""
        return [line for line in (self.home / "commands").read_text().splitlines() if text in line]


def give_default_route(vpc: str, **target: str) -> str:
    """Add a default route to the main route table of a VPC and return the table's id."""
    ec2 = boto3.client("ec2")
    (table,) = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["RouteTables"]
    ec2.create_route(RouteTableId=table["RouteTableId"], DestinationCidrBlock="0.0.0.0/0", **target)
    return str(table["RouteTableId"])


@contextmanager
def make_account(home: Path) -> Iterator[Account]:
    """Create a bucket and a VPC with two private subnets and a public one at the S3 server; clean up at the end."""
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
