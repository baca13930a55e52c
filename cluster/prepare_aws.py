"""Preparation of a cluster on AWS before `ray up`: security group, roles, SSH key, token and build/aws.yaml.

  python cluster/prepare_aws.py --region us-east-1 --subnet subnet-1 --photos s3://my-bucket/photos \\
      --root s3://my-bucket/carclass --image 123456789012.dkr.ecr.us-east-1.amazonaws.com/carclass@sha256:…
  ray up build/aws.yaml

Run by an administrator, once and after changes; it is idempotent. The same command with --remove deletes everything it
created (after `ray down build/aws.yaml`). Users start and use the cluster with the role carclass-operator. Nodes may
read below --photos (labels included), and read and write below --root. They can also list the names of other objects in
these buckets, because S3 reports a missing object only to those who may list.
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

from carclass.config import cli, yaml_file
from carclass.errors import UserError

FOLDER = Path(__file__).parent
CLUSTER_FILE = Path("build/aws.yaml")
GPU_AMI = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
"""Ubuntu with Docker, NVIDIA's driver and container runtime, and Systems Manager's agent."""
POLICIES = {"worker": ["worker"], "head": ["worker", "head"], "operator": ["operator"]}
"""Policies of each role, by file names in iam/."""
Values = dict[str, Any]


def main() -> None:
    """Create or remove the cluster's AWS resources."""
    options = parse_options()
    values = storage_values(options.photos, options.root)
    session = boto3.Session(region_name=options.region)
    ec2, iam = session.client("ec2"), session.client("iam")
    template = (FOLDER / "aws.yaml").read_text()
    cluster = read_template()["cluster_name"]
    vpc, key = find_private_vpc(ec2, options.subnet), Path(f"~/.ssh/{cluster}.pem").expanduser()
    if options.remove:
        remove(ec2, iam, cluster, vpc, key)
        return
    create_key(ec2, cluster, key)
    values |= cluster_values(session, options, cluster, create_group(ec2, vpc, cluster)) | {"KEY_FILE": str(key)}
    create_roles(iam, values)
    create_token(cluster)
    CLUSTER_FILE.parent.mkdir(exist_ok=True)
    CLUSTER_FILE.write_text(fill(template, values))
    print(f"{CLUSTER_FILE} is ready. As {cluster}-operator:  ray up {CLUSTER_FILE}")
    print(f"To submit jobs:  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token_file(cluster)}")


def parse_options() -> argparse.Namespace:
    """Parse the command line. Raise UserError for an image without a digest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--region", required=True)
    parser.add_argument("--subnet", required=True, help="private subnet of the nodes")
    parser.add_argument("--photos", required=True, help="s3:// prefix that jobs read")
    parser.add_argument("--root", required=True, help="s3:// prefix that jobs read and write")
    parser.add_argument("--image", required=True, help="image of the Dockerfile, by digest: …@sha256:…")
    parser.add_argument("--ami", default=GPU_AMI, help="Ubuntu with Docker: ami-…, or an SSM parameter (%(default)s)")
    parser.add_argument("--remove", action="store_true", help="delete everything created by this script")
    options = parser.parse_args()
    if "@sha256:" not in options.image:
        raise UserError(f"--image {options.image} has no digest, so its content could change. Give …@sha256:….")
    return options


def cluster_values(session: boto3.Session, options: argparse.Namespace, cluster: str, group: str) -> Values:
    """Return the other placeholders of aws.yaml and iam/."""
    ami, account = options.ami, session.client("sts").get_caller_identity()["Account"]
    if not ami.startswith("ami-"):
        ami = session.client("ssm").get_parameter(Name=ami)["Parameter"]["Value"]
    registry, _, repository = options.image.partition("@")[0].partition("/")
    types = read_template()["available_node_types"]
    instances = {name: each["node_config"]["InstanceType"] for name, each in types.items()}
    resources = [
        f"security-group/{group}",
        f"key-pair/{cluster}",
        f"subnet/{options.subnet}",
        "spot-instances-request/*",
    ]
    resources = [f":image/{ami}", *(f"{account}:{resource}" for resource in resources)]
    return {
        "CLUSTER": cluster,
        "REGION": options.region,
        "ACCOUNT": account,
        "SUBNET": options.subnet,
        "SECURITY_GROUP": group,
        "AMI": ami,
        "LAUNCH_RESOURCES": [f"arn:aws:ec2:{options.region}:{resource}" for resource in resources],
        "TOKEN_FOLDER": str(token_file(cluster).parent),
        "HEAD_TYPE": instances.pop("head"),
        "WORKER_TYPES": sorted(set(instances.values())),
        "IMAGE": options.image,
        "REGISTRY": registry,
        "REPOSITORY": f"arn:aws:ecr:{options.region}:{account}:repository/{repository}",
    }


def storage_values(photos: str, root: str) -> Values:
    """Return the placeholders for S3 buckets and prefixes. Raise UserError for anything but s3://bucket/prefix."""
    values: Values = {}
    for name, uri in (("PHOTOS", photos), ("ROOT", root)):
        bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
        if not uri.startswith("s3://") or not prefix:
            raise UserError(f"{uri}: give s3://bucket/prefix, so that nodes cannot access the rest of the bucket.")
        values |= {f"{name}_BUCKET": bucket, name: f"{prefix}/*"}
    folders = values["ROOT"].split("/")[:-1]  # Arrow writes an empty object for each of them
    paths = ["/".join(folders[: n + 1]) for n in range(len(folders))]
    return values | {"ROOT_FOLDERS": [f"arn:aws:s3:::{values['ROOT_BUCKET']}/{path}/" for path in paths]}


def find_private_vpc(ec2: Any, subnet: str) -> str:
    """Return the VPC of the subnet. Raise UserError if the subnet assigns public IP addresses."""
    (description,) = ec2.describe_subnets(SubnetIds=[subnet])["Subnets"]
    if description["MapPublicIpOnLaunch"]:
        raise UserError(f"--subnet: {subnet} assigns public IP addresses. Give a private subnet.")
    return str(description["VpcId"])


def find_group(ec2: Any, vpc: str, cluster: str) -> str | None:
    """Return the id of the cluster's security group, None if it does not exist."""
    filters = [{"Name": "vpc-id", "Values": [vpc]}, {"Name": "group-name", "Values": [cluster]}]
    return next((group["GroupId"] for group in ec2.describe_security_groups(Filters=filters)["SecurityGroups"]), None)


def create_group(ec2: Any, vpc: str, cluster: str) -> str:
    """Return the id of a security group that allows connections between its members only; create what is missing."""
    group = find_group(ec2, vpc, cluster)
    if group is None:
        created = ec2.create_security_group(GroupName=cluster, Description=f"Ray cluster {cluster}", VpcId=vpc)
        group = str(created["GroupId"])
    rule = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
    try:  # also for an existing group: an earlier run may have ended before it had the rule
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[rule])
    except ec2.exceptions.ClientError as error:
        if error.response["Error"]["Code"] != "InvalidPermission.Duplicate":
            raise
    return group


def create_key(ec2: Any, cluster: str, path: Path) -> None:
    """Create the cluster's SSH key on EC2 and in a local file. Raise UserError if only one of the two exists."""
    pairs = ec2.describe_key_pairs(Filters=[{"Name": "key-name", "Values": [cluster]}])["KeyPairs"]
    if bool(pairs) != path.exists():
        present, absent = ("on EC2", f"at {path}") if pairs else (f"at {path}", "on EC2")
        raise UserError(f"the SSH key {cluster} exists {present} but not {absent}. Copy it or delete it.")
    if not pairs:
        write_secret(path, ec2.create_key_pair(KeyName=cluster, KeyType="ed25519")["KeyMaterial"])


def token_file(cluster: str) -> Path:
    """Return the file of the cluster's token, alone in its folder: not that of the clusters on this machine."""
    return Path(f"~/.ray/{cluster}/auth_token").expanduser()


def create_token(cluster: str) -> None:
    """Create the cluster's token if it is missing, readable by its owner only."""
    file = token_file(cluster)
    if not file.exists():
        write_secret(file, secrets.token_hex(32))
    file.parent.chmod(0o700)
    file.chmod(0o600)


def write_secret(path: Path, text: str) -> None:
    """Write a new file with mode 0600."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def create_roles(iam: Any, values: Values) -> None:
    """Create the roles with the policies of iam/, and the instance profiles of the nodes."""
    users, nodes = {"AWS": f"arn:aws:iam::{values['ACCOUNT']}:root"}, {"Service": "ec2.amazonaws.com"}
    for kind, policies in POLICIES.items():
        name = f"{values['CLUSTER']}-{kind}"
        principal = users if kind == "operator" else nodes
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
            with suppress(iam.exceptions.LimitExceededException):  # a profile has at most one role
                iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    # An account needs this service-linked role once to request spot instances.
    if not iam.list_roles(PathPrefix="/aws-service-role/spot.amazonaws.com/")["Roles"]:
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")


def read_template() -> Values:
    """Return the content of aws.yaml, with its placeholders. Raise UserError for a key that is given twice."""
    file = FOLDER / "aws.yaml"
    values: Values = yaml_file.parse(file.read_text().replace("${", "$${"), str(file), plain=yaml.safe_load)
    return values


def read_policy(name: str, values: Values) -> Values:
    """Return a policy of iam/ with its placeholders filled in, without the ECR statements for images elsewhere."""
    policy: Values = json.loads(fill((FOLDER / "iam" / f"{name}.json").read_text(), values))
    if ".dkr.ecr." not in values["REGISTRY"]:
        policy["Statement"] = [each for each in policy["Statement"] if not each["Sid"].startswith("Ecr")]
    return policy


def fill(text: str, values: Values) -> str:
    """Fill in the ${PLACEHOLDERS} of a text; a quoted placeholder with a list as value becomes a list."""
    for name in (name for name in values if isinstance(values[name], list)):
        text = text.replace(f'"${{{name}}}"', json.dumps(values[name]))
    return string.Template(text).safe_substitute(values)  # leaves $RAY_HEAD_IP and ${aws:userid}


def remove(ec2: Any, iam: Any, cluster: str, vpc: str, key: Path) -> None:
    """Delete everything created except the token. Raise UserError if the cluster has nodes."""
    states = {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "shutting-down"]}
    nodes = ec2.describe_instances(Filters=[{"Name": "tag:ray-cluster-name", "Values": [cluster]}, states])
    if nodes["Reservations"]:
        raise UserError(f"the cluster {cluster} still has nodes. Run `ray down {CLUSTER_FILE}` first.")
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
