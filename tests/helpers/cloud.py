"""A simulated cloud: AWS by moto, whose instances are machines in network namespaces on which commands really run.

The operator's machine has the programs of tests/helpers/shims instead of ssh, rsync, docker and the AWS CLI; Ray's
launcher and autoscaler, and carclass, are the real ones.
"""

import base64
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3

from tests.helpers.aws import AMI, REFUSAL, Recorder, RecordingHandler, Request
from tests.helpers.clusters import RAY, Job
from tests.helpers.hosts import NETWORK, Network
from tests.helpers.machine import Machine
from tests.helpers.provisioner import Message, Provisioner, in_namespace

REPO = Path(__file__).parents[2]
ENDPOINT = (f"{NETWORK}.250", 5000)
PROGRAMS = {
    "ssh": ["ssh"], "rsync": ["rsync"], "docker": ["docker"], "aws": ["aws"], "sudo": ["sudo"],
    "shutdown": ["shutdown"], "poweroff": ["shutdown"], "halt": ["shutdown"],
    "usermod": ["groups", "usermod"], "id": ["groups", "id"], "systemd-run": ["systemd_run"],
}  # fmt: skip
"""Program → module of tests/helpers/shims and its first words."""
AT_BOOT = {"sleep": ["sleep"]}
"""Programs that precede the others in what an instance runs at its boot."""
LAUNCHER = """#!{python} -sE
import runpy, sys
sys.path.insert(0, {repo!r})
sys.argv[1:1] = {words!r}
runpy.run_module("tests.helpers.shims.{module}", run_name="__main__")
"""
ROLE = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Variables that stand for the role of an instance or an operator."""


class Endpoint(Recorder):
    """AWS as hosts reach it; `refuse` returns the error code of a request that is to be refused, None otherwise."""

    def __init__(self, endpoint: str, address: tuple[str, int]) -> None:
        super().__init__(endpoint, address)
        self.RequestHandlerClass = EndpointHandler
        self.refuse: Callable[[Request], str | None] = lambda request: None


class EndpointHandler(RecordingHandler):
    """A connection to an endpoint. moto has no machine images with GPU drivers: it is asked for another one."""

    server: Endpoint
    refusal: str | None = None

    def chunks(self) -> Iterator[bytes]:
        body = b"".join(super().chunks())
        self.refusal = self.server.refuse(self.server.requests[-1]) if b"Action=RunInstances" in body else None
        yield re.sub(rb"/aws/service/deeplearning/ami/[^\"]+", AMI.encode(), body)

    def forward(self, body: bytes, damage: str) -> None:
        if self.refusal:
            self.reply(400, {"Content-Type": "text/xml"}, REFUSAL.format(self.refusal).encode())
        else:
            super().forward(body, damage)


@dataclass
class Instance:
    """An EC2 instance with its machine."""

    id: str
    kind: str
    """Name of its node type in cluster/aws.yaml."""
    machine: Machine
    address: str
    launched: float
    ended: float | None = None

    def minutes(self) -> float:
        """Return the minutes for which it has run."""
        return ((self.ended or time.monotonic()) - self.launched) / 60


@dataclass
class Cloud:
    """The account, its network, the operator's machine and the instances by id."""

    folder: Path
    network: Network
    subnets: list[str]
    """Private subnets with a NAT gateway, in different zones."""
    nodes: Endpoint
    """Endpoint of the nodes."""
    operator: Machine
    office: Endpoint
    """Endpoint of the operator."""
    instances: dict[str, Instance] = field(default_factory=dict)
    images: set[str] = field(default_factory=set)
    """Names of the images in registries other than the account's."""
    provisioner: Provisioner = field(init=False)
    closed: threading.Event = field(default_factory=threading.Event)

    @property
    def home(self) -> Path:
        """Return the operator's home folder."""
        return self.folder / "operator"

    @property
    def desk(self) -> Path:
        """Return the operator's checkout: copies of this one's files, and a link to its virtual environment."""
        return self.folder / "checkout"

    def running(self, kind: str | None = None) -> list[Instance]:
        """Return the instances that run, of a node type."""
        return [each for each in self.instances.values() if each.ended is None and kind in (None, each.kind)]

    def minutes(self) -> float:
        """Return the minutes of all instances."""
        return sum(each.minutes() for each in self.instances.values())

    def find(self, name: str) -> Machine | None:
        """Return the machine with a name, an instance id or an address; launched ones are created meanwhile."""
        if name == "operator":
            return self.operator
        self.update()
        found = [each for each in self.instances.values() if name in (each.id, each.address)]
        return found[-1].machine if found else None

    def environment(self, machine: Machine) -> dict[str, str]:
        """Return the variables of a login on a machine."""
        user = "operator" if machine is self.operator else "ubuntu"
        home = str(self.home) if machine is self.operator else "/home/ubuntu"
        host, port = self.office.server_address if machine is self.operator else ENDPOINT
        return {
            "PATH": f"{self.folder}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            **{"HOME": home, "USER": user, "LOGNAME": user, "SHELL": "/bin/bash", "TERM": "dumb"},
            **ROLE,
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "CLOUD_SOCKET": str(self.folder / "provisioner"),
            "CLOUD_HOST": machine.name,
        }

    def type(self, command: str) -> Job:
        """Start a shell command at the operator's terminal, with the answer yes to questions."""
        terminal, keyboard = os.openpty()
        os.write(terminal, b"y\n")
        extra = {"DOCKER_STATE": str(self.home / ".docker"), "TMPDIR": str(self.home / "tmp")}
        environment = {**self.environment(self.operator), **extra}
        log = self.home / f"{len(self.operator.started)}.log"
        with log.open("w") as out:
            process = self.operator.popen(
                ["bash", "-c", command], environment, self.desk, stdin=keyboard, stdout=out, stderr=out
            )
        os.close(keyboard)
        self.operator.started.append(process)
        return Job(process, log)

    def update(self) -> None:
        """Create machines for new instances and switch off those of terminated ones."""
        with self._lock:
            known = {each.id for each in self.running()}
            filters = [{"Name": "subnet-id", "Values": self.subnets}]
            for page in boto3.client("ec2").describe_instances(Filters=filters)["Reservations"]:
                for found in page["Instances"]:
                    name, state = found["InstanceId"], found["State"]["Name"]
                    if state in ("pending", "running") and name not in self.instances:
                        self._create(found)
                    elif state not in ("pending", "running") and name in known:
                        self.instances[name].ended = time.monotonic()
                        self.network.remove(self.instances[name].machine)

    _lock: Any = field(default_factory=threading.Lock)

    def _create(self, found: dict[str, Any]) -> None:
        tags = {tag["Key"]: tag["Value"] for tag in found.get("Tags", [])}
        address = found["PrivateIpAddress"]
        machine = self.network.add(found["InstanceId"], int(address.rpartition(".")[2]), Machine)
        make_image(machine.home / "opt" / "carclass")
        machine.boot(self.folder / "profile")
        kind = tags.get("ray-user-node-type", "")
        self.instances[machine.name] = Instance(machine.name, kind, machine, address, time.monotonic())
        self._run_user_data(machine)

    def _run_user_data(self, machine: Machine) -> None:
        reply = boto3.client("ec2").describe_instance_attribute(InstanceId=machine.name, Attribute="userData")
        if text := reply["UserData"].get("Value"):
            file = machine.home / "home" / "ubuntu" / "user-data"
            file.write_bytes(base64.b64decode(text))
            file.chmod(0o755)
            environment = {**self.environment(machine), "HOME": "/root", "USER": "root"}
            environment["PATH"] = f"{self.folder}/boot:{environment['PATH']}"
            machine.start(["/home/ubuntu/user-data"], environment)

    def shut_down(self, request: Message, _: list[int]) -> int:
        """End an instance whose operating system shuts down, as EC2 does by its attribute."""
        ec2, name = boto3.client("ec2"), request["host"]
        reply = ec2.describe_instance_attribute(InstanceId=name, Attribute="instanceInitiatedShutdownBehavior")
        ends = reply["InstanceInitiatedShutdownBehavior"].get("Value") == "terminate"
        (ec2.terminate_instances if ends else ec2.stop_instances)(InstanceIds=[name])
        self.update()
        return 0

    def pull(self, request: Message, streams: list[int]) -> int:
        """Find an image of a registry."""
        found = request["image"] in self.images
        if not found:
            os.write(streams[2], b"Error response from daemon: manifest unknown\n")
        return 0 if found else 1

    def push(self, request: Message, streams: list[int]) -> int:
        """Put an image into the account's registry under its tag."""
        registry, _, name = request["image"].partition("/")
        repository, _, tag = name.partition(":")
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": {"digest": secrets.token_hex(32)}})
        digest = f"sha256:{hashlib.sha256(manifest.encode()).hexdigest()}"
        ecr = boto3.client("ecr")
        try:
            ecr.put_image(
                repositoryName=repository, imageManifest=manifest, imageTag=tag or "latest", imageDigest=digest
            )
        except ecr.exceptions.ClientError as error:
            os.write(streams[2], f"{error}\n".encode())
            return 1
        self.images.add(f"{registry}/{repository}@{digest}")
        os.write(streams[1], f"{tag or 'latest'}: digest: {digest} size: 1234\n".encode())
        return 0

    def watch(self) -> None:
        """Follow the account's instances until the cloud is closed."""
        while not self.closed.wait(1):
            self.update()


@contextmanager
def make_cloud(folder: Path) -> Iterator[Cloud]:
    """Create private subnets in the account of the S3 server, with an operator outside of them; clean up at the end."""
    network = Network(folder / "hosts")
    try:
        write_files(folder)
        aws, operator = network.add("aws", 250), network.add_outside("operator", Machine)
        endpoint = os.environ["AWS_ENDPOINT_URL"]
        nodes = in_namespace(aws.space, lambda: Endpoint(endpoint, ENDPOINT))
        office = in_namespace(operator.space, lambda: Endpoint(endpoint, ("127.0.0.1", ENDPOINT[1])))
        operator.boot(folder / "profile")
        cloud = Cloud(folder, network, create_subnets(), nodes, operator, office)
        operations = {"shutdown": cloud.shut_down, "pull": cloud.pull, "push": cloud.push}
        cloud.provisioner = Provisioner(folder / "provisioner", cloud.find, cloud.environment, operations)
        servers = (nodes, office, cloud.provisioner)
        for server in servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        watcher = threading.Thread(target=cloud.watch)
        watcher.start()
        try:
            yield cloud
        finally:
            cloud.closed.set()
            watcher.join()
            for server in servers:
                server.shutdown()
                server.server_close()
            for session in [*cloud.provisioner.sessions]:
                session.cut()
    finally:
        network.close()


def create_subnets() -> list[str]:
    """Create a VPC with three private subnets in different zones, behind a NAT gateway and an endpoint for S3."""
    ec2 = boto3.client("ec2")
    vpc = ec2.create_vpc(CidrBlock=f"{NETWORK}.0/24")["Vpc"]["VpcId"]
    *private, public = (
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"{NETWORK}.{number * 64}/26", AvailabilityZone=f"us-east-1{zone}")
        for number, zone in enumerate("abca")
    )
    gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
    address = ec2.allocate_address(Domain="vpc")["AllocationId"]
    nat = ec2.create_nat_gateway(SubnetId=public["Subnet"]["SubnetId"], AllocationId=address)["NatGateway"]
    subnets = [each["Subnet"]["SubnetId"] for each in private]
    everywhere: dict[str, Any] = {"DestinationCidrBlock": "0.0.0.0/0"}
    for route, members in (
        ({"NatGatewayId": nat["NatGatewayId"]}, subnets),
        ({"GatewayId": gateway}, [public["Subnet"]["SubnetId"]]),
    ):
        table = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
        ec2.create_route(RouteTableId=table, **everywhere, **route)
        for subnet in members:
            ec2.associate_route_table(RouteTableId=table, SubnetId=subnet)
        if members is subnets:
            ec2.create_vpc_endpoint(VpcId=vpc, ServiceName="com.amazonaws.us-east-1.s3", RouteTableIds=[table])
    return subnets


def write_files(folder: Path) -> None:
    """Write the programs, the operator's home and checkout, and the profile of login shells."""
    programs = folder / "bin"
    for place, listed in ((programs, PROGRAMS), (folder / "boot", AT_BOOT)):
        place.mkdir()
        for name, (module, *words) in listed.items():
            text = LAUNCHER.format(python=sys.executable, repo=str(REPO), module=module, words=words)
            (place / name).write_text(text)
            (place / name).chmod(0o755)
    path = f"{programs}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    lines = [
        f"export PATH={path}",
        '[ -z "$CONTAINER" ] || export PATH=/opt/carclass/bin:$PATH',  # as cluster/image/system.sh
        # A container may raise the limit of open files; this machine may not allow it.
        'ulimit() { builtin ulimit "$@" 2> /dev/null || true; }',
    ]
    (folder / "profile").write_text("\n".join(lines))
    for path in (folder / "operator" / "tmp", folder / "checkout"):
        path.mkdir(parents=True)
    for name in ("cluster", "jobs"):
        shutil.copytree(REPO / name, folder / "checkout" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Dockerfile", "Makefile"):
        shutil.copy(REPO / name, folder / "checkout")
    (folder / "checkout" / ".venv").symlink_to(sys.prefix)


def make_image(folder: Path) -> None:
    """Make the content of the Dockerfile's image: a virtual environment with this one's packages, and its programs."""
    (folder / "bin").mkdir(parents=True)
    for name in ("pyvenv.cfg", "lib"):
        (folder / name).symlink_to(Path(sys.prefix) / name)
    for name in ("python", "python3"):
        (folder / "bin" / name).symlink_to(Path(sys.executable).resolve())
    (folder / "bin" / "ray").symlink_to(RAY)
    for name in ("certificates.py", "spot_first.py", "watch_spot.py"):
        shutil.copy(REPO / "cluster" / "image" / name, folder / "bin" / name)
