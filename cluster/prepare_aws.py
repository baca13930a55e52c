"""What a cluster on AWS needs before `ray up`: a security group, roles, an SSH key, a token, and build/aws.yaml.

  python cluster/prepare_aws.py --region us-east-1 --subnet subnet-1 --photos s3://my-bucket/photos \\
      --root s3://my-bucket/carclass --image 123456789012.dkr.ecr.us-east-1.amazonaws.com/carclass@sha256:…
  ray up build/aws.yaml

For an administrator, once; after a change again: nothing is made twice. The same line with --remove takes away what was
made (after `ray down build/aws.yaml`). People start and use the cluster as the role carclass-operator. Nodes may read
below --photos (put labels there too), and read and write below --root. They can also learn the names of other objects
in these buckets: to be told that an object isn't there, one needs the right to list.
"""

import argparse
import json
import os
import secrets
import string
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import yaml

from carclass.config import cli
from carclass.errors import UserError

HERE = Path(__file__).parent
FILLED = Path("build/aws.yaml")
TOKEN = Path("~/.ray/auth_token").expanduser()
GPU_AMI = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
"""Ubuntu with Docker, NVIDIA's driver and container runtime, and Systems Manager's agent."""
POLICIES = {"worker": ["worker"], "head": ["worker", "head"], "operator": ["operator"]}
"""What each role may, by the names of files in iam/."""
Values = dict[str, Any]


def main() -> None:
    """Makes or removes what the cluster needs."""
    options = arguments()
    values = places(options.photos, options.root)
    session = boto3.Session(region_name=options.region)
    ec2, iam = session.client("ec2"), session.client("iam")
    template = (HERE / "aws.yaml").read_text()
    cluster = yaml.safe_load(template)["cluster_name"]
    vpc, key = private_vpc(ec2, options.subnet), Path(f"~/.ssh/{cluster}.pem").expanduser()
    if options.remove:
        remove(ec2, iam, cluster, vpc, key)
        return
    make_key(ec2, cluster, key)
    values |= describe(session, options, cluster, make_group(ec2, vpc, cluster)) | {"KEY_FILE": str(key)}
    make_roles(iam, values)
    if not TOKEN.exists():
        write_secret(TOKEN, secrets.token_hex(32))
    TOKEN.chmod(0o600)
    FILLED.parent.mkdir(exist_ok=True)
    FILLED.write_text(fill(template, values))
    print(f"{FILLED} is ready. As {cluster}-operator:  ray up {FILLED}")


def arguments() -> argparse.Namespace:
    """The command line; UserError for an image without a digest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--region", required=True)
    parser.add_argument("--subnet", required=True, help="a private one")
    parser.add_argument("--photos", required=True, help="s3:// prefix that jobs read")
    parser.add_argument("--root", required=True, help="s3:// prefix that jobs read and write")
    parser.add_argument("--image", required=True, help="of the Dockerfile, by digest: …@sha256:…")
    parser.add_argument("--ami", default=GPU_AMI, help="Ubuntu with Docker: ami-…, or an SSM parameter (%(default)s)")
    parser.add_argument("--remove", action="store_true", help="take away what was made")
    options = parser.parse_args()
    if "@sha256:" not in options.image:
        raise UserError(f"--image {options.image} names no digest, so what runs could change. Give …@sha256:….")
    return options


def describe(session: boto3.Session, options: argparse.Namespace, cluster: str, group: str) -> Values:
    """What fills the placeholders of aws.yaml and iam/."""
    ami, account = options.ami, session.client("sts").get_caller_identity()["Account"]
    if not ami.startswith("ami-"):
        ami = session.client("ssm").get_parameter(Name=ami)["Parameter"]["Value"]
    registry, _, repository = options.image.partition("@")[0].partition("/")
    types = yaml.safe_load((HERE / "aws.yaml").read_text())["available_node_types"]
    machines = {name: each["node_config"]["InstanceType"] for name, each in types.items()}
    parts = [f"security-group/{group}", f"key-pair/{cluster}", f"subnet/{options.subnet}", "spot-instances-request/*"]
    parts = [f":image/{ami}", *(f"{account}:{part}" for part in parts)]
    return {
        "CLUSTER": cluster,
        "REGION": options.region,
        "ACCOUNT": account,
        "SUBNET": options.subnet,
        "SECURITY_GROUP": group,
        "AMI": ami,
        "PARTS": [f"arn:aws:ec2:{options.region}:{part}" for part in parts],
        "TOKEN_FILE": str(TOKEN),
        "HEAD_TYPE": machines.pop("head"),
        "WORKER_TYPES": sorted(set(machines.values())),
        "IMAGE": options.image,
        "REGISTRY": registry,
        "REPOSITORY": f"arn:aws:ecr:{options.region}:{account}:repository/{repository}",
    }


def places(photos: str, root: str) -> Values:
    """What fills the placeholders of S3's buckets and prefixes; UserError for a whole bucket or anything else."""
    values: Values = {}
    for name, uri in (("PHOTOS", photos), ("ROOT", root)):
        bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
        if not uri.startswith("s3://") or not prefix:
            raise UserError(f"{uri}: give s3://bucket/prefix; nodes then can't touch what else is in the bucket.")
        values |= {f"{name}_BUCKET": bucket, name: f"{prefix}/*"}
    folders = values["ROOT"].split("/")[:-1]  # Arrow puts an empty object for every one of them
    paths = ["/".join(folders[: n + 1]) for n in range(len(folders))]
    return values | {"ROOT_FOLDERS": [f"arn:aws:s3:::{values['ROOT_BUCKET']}/{path}/" for path in paths]}


def private_vpc(ec2: Any, subnet: str) -> str:
    """The VPC of the subnet; UserError when it gives public IP addresses."""
    (found,) = ec2.describe_subnets(SubnetIds=[subnet])["Subnets"]
    if found["MapPublicIpOnLaunch"]:
        raise UserError(f"--subnet: {subnet} gives public IP addresses. Give a private one.")
    return str(found["VpcId"])


def find_group(ec2: Any, vpc: str, cluster: str) -> str | None:
    """The id of the cluster's security group, if there is one."""
    filters = [{"Name": "vpc-id", "Values": [vpc]}, {"Name": "group-name", "Values": [cluster]}]
    return next((group["GroupId"] for group in ec2.describe_security_groups(Filters=filters)["SecurityGroups"]), None)


def make_group(ec2: Any, vpc: str, cluster: str) -> str:
    """The id of a security group whose members may connect to each other, and nobody else to them."""
    if group := find_group(ec2, vpc, cluster):
        return group
    made = ec2.create_security_group(GroupName=cluster, Description=f"Ray cluster {cluster}", VpcId=vpc)["GroupId"]
    rule = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": made}]}
    ec2.authorize_security_group_ingress(GroupId=made, IpPermissions=[rule])
    return str(made)


def make_key(ec2: Any, cluster: str, path: Path) -> None:
    """The cluster's SSH key, on EC2 and here; UserError when only one of the two is there."""
    known = ec2.describe_key_pairs(Filters=[{"Name": "key-name", "Values": [cluster]}])["KeyPairs"]
    if bool(known) != path.exists():
        where = "EC2 has it" if known else "EC2 has none"
        raise UserError(f"the SSH key {cluster} is here ({path}) or on EC2, not both: {where}. Copy it or delete it.")
    if not known:
        write_secret(path, ec2.create_key_pair(KeyName=cluster, KeyType="ed25519")["KeyMaterial"])


def write_secret(path: Path, text: str) -> None:
    """A new file that only its owner may read."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def make_roles(iam: Any, values: Values) -> None:
    """Roles with what iam/ says they may, and profiles by which EC2 gives them to nodes."""
    people, machines = {"AWS": f"arn:aws:iam::{values['ACCOUNT']}:root"}, {"Service": "ec2.amazonaws.com"}
    for kind, policies in POLICIES.items():
        name = f"{values['CLUSTER']}-{kind}"
        principal = people if kind == "operator" else machines
        trust = {"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        with suppress(iam.exceptions.EntityAlreadyExistsException):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=document)
        for policy in policies:
            text = json.dumps(read_policy(policy, values))
            iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=text)
        if kind != "operator":
            with suppress(iam.exceptions.EntityAlreadyExistsException):
                iam.create_instance_profile(InstanceProfileName=name)
            with suppress(iam.exceptions.LimitExceededException):  # it has its one role
                iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    # Without this role, which an account has once, it may not ask for spot instances.
    if not iam.list_roles(PathPrefix="/aws-service-role/spot.amazonaws.com/")["Roles"]:
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")


def read_policy(name: str, values: Values) -> Values:
    """A policy of iam/, filled in; that of an image elsewhere than in ECR says nothing of ECR."""
    policy: Values = json.loads(fill((HERE / "iam" / f"{name}.json").read_text(), values))
    if ".dkr.ecr." not in values["REGISTRY"]:
        policy["Statement"] = [each for each in policy["Statement"] if not each["Sid"].startswith("Ecr")]
    return policy


def fill(text: str, values: Values) -> str:
    """The text with its ${PLACEHOLDERS} filled in; a quoted one whose value is a list becomes a list."""
    for name in (name for name in values if isinstance(values[name], list)):
        text = text.replace(f'"${{{name}}}"', json.dumps(values[name]))
    return string.Template(text).safe_substitute(values)  # $RAY_HEAD_IP and ${aws:userid} are not ours


def remove(ec2: Any, iam: Any, cluster: str, vpc: str, key: Path) -> None:
    """Takes away what was made, but the token; UserError while there are nodes."""
    states = {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "shutting-down"]}
    nodes = ec2.describe_instances(Filters=[{"Name": "tag:ray-cluster-name", "Values": [cluster]}, states])
    if nodes["Reservations"]:
        raise UserError(f"the cluster {cluster} still has nodes. First: ray down {FILLED}")
    for kind, policies in POLICIES.items():
        name = f"{cluster}-{kind}"
        with suppress(iam.exceptions.NoSuchEntityException):
            iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=name)
            iam.delete_instance_profile(InstanceProfileName=name)
        with suppress(iam.exceptions.NoSuchEntityException):
            for policy in policies:
                iam.delete_role_policy(RoleName=name, PolicyName=policy)
            iam.delete_role(RoleName=name)
    if group := find_group(ec2, vpc, cluster):
        ec2.delete_security_group(GroupId=group)
    ec2.delete_key_pair(KeyName=cluster)
    key.unlink(missing_ok=True)


if __name__ == "__main__":
    cli.main(main)
