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
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import yaml
from aws_network import ECR_ENDPOINTS, ENDPOINTS, check_subnets, create_group, find_group
from aws_roles import caller_arn, create_roles, fill, remove_roles
from botocore.exceptions import ClientError

from carclass.config import cli, yaml_file
from carclass.errors import UserError

FOLDER = Path(__file__).parent
CLUSTER_FILE = Path("build/aws.yaml")
GPU_AMI = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
"""Ubuntu with Docker, NVIDIA's driver and container runtime, and Systems Manager's agent."""
PROGRAMS = ("aws", "session-manager-plugin", "ssh", "rsync")
"""Needed by `ray up`."""
ALARMS = (50, 80, 100)
"""Shares of the budget in percent at which AWS writes an e-mail."""
Values = dict[str, Any]


def main() -> None:
    """Create or remove the cluster's AWS resources."""
    options = parse_options()
    session = boto3.Session(region_name=options.region)
    ec2, cluster = session.client("ec2"), read_template()["cluster_name"]
    key = Path(f"~/.ssh/{cluster}.pem")
    if options.remove:
        remove(session, cluster, options.subnet[0], key.expanduser())
        return
    values, advice = check(session, options, cluster)
    create_key(ec2, cluster, key.expanduser())
    values |= launch_values(values, create_group(ec2, values["VPC"], cluster)) | {"KEY_FILE": str(key)}
    create_roles(session.client("iam"), values)
    create_token(cluster)
    if values["TLS"] == "1":
        script = FOLDER / "image" / "certificates.py"
        subprocess.run([sys.executable, script, "authority", token_file(cluster).parent], check=True)  # noqa: S603
    if options.budget:
        create_budget(session.client("budgets"), values["ACCOUNT"], cluster, options.budget, options.email)
    CLUSTER_FILE.parent.mkdir(exist_ok=True)
    CLUSTER_FILE.write_text(fill((FOLDER / "aws.yaml").read_text(), values))
    for text in advice:
        print(f"advice: {text}")
    print(f"{CLUSTER_FILE} is ready. As {cluster}-operator:  ray up {CLUSTER_FILE}")
    print(f"Other operators need it too, {key} and the files in {token_file(cluster).parent}, with mode 0600.")
    print("Operators are:")
    print("\n".join(f"  {arn}" for arn in values["OPERATORS"]))
    print(f"To submit jobs:  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token_file(cluster)}")


def parse_options() -> argparse.Namespace:
    """Parse the command line. Raise UserError for an image without a digest, or a budget without an address."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--region", required=True)
    parser.add_argument(
        "--subnet",
        required=True,
        action="append",
        help="private subnet of the nodes; several: the head is in the first",
    )
    parser.add_argument("--photos", required=True, help="s3:// prefix that jobs read")
    parser.add_argument("--root", required=True, help="s3:// prefix that jobs read and write")
    parser.add_argument("--image", required=True, help="image of the Dockerfile, by digest: …@sha256:…")
    parser.add_argument("--ami", default=GPU_AMI, help="Ubuntu with Docker: ami-…, or an SSM parameter (%(default)s)")
    parser.add_argument(
        "--operator", action="append", help="ARN of a user (with MFA) or role that may be operator; by default you"
    )
    parser.add_argument("--budget", type=float, help="dollars a month, at whose shares of 50, 80 and 100 %% AWS writes")
    parser.add_argument("--email", help="address for --budget")
    parser.add_argument("--tls", action="store_true", help="encrypt Ray's traffic between nodes")
    parser.add_argument("--remove", action="store_true", help="delete everything created by this script")
    options = parser.parse_args()
    if "@sha256:" not in options.image:
        raise UserError(f"--image {options.image} has no digest, so its content could change. Give …@sha256:….")
    if bool(options.budget) != bool(options.email):
        raise UserError("give --budget and --email together.")
    return options


def check(session: boto3.Session, options: argparse.Namespace, cluster: str) -> tuple[Values, list[str]]:
    """Return the placeholders of aws.yaml and iam/, and advice. Raise UserError for what would not work."""
    types = read_template()["available_node_types"]
    instances = {name: each["node_config"]["InstanceType"] for name, each in types.items()}
    is_on_ecr = ".dkr.ecr." in options.image
    services = (*ENDPOINTS, *ECR_ENDPOINTS) if is_on_ecr else ENDPOINTS
    vpc, *advice = check_subnets(session.client("ec2"), options.subnet, services, instances.values())
    values = storage_values(options.photos, options.root)
    keys, storage_advice = check_buckets(session, {values["PHOTOS_BUCKET"], values["ROOT_BUCKET"]})
    advice += storage_advice
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        advice.append(f"`ray up` needs {', '.join(absent)} on this machine.")
    if has_authority(cluster) and not options.tls:
        files = f"{token_file(cluster).parent}/ca.*"
        advice.append(
            f"TLS between nodes stays on, as by --tls before. To turn it off, delete {files} and run this again."
        )
    values |= {
        "CLUSTER": cluster,
        "REGION": options.region,
        "ACCOUNT": session.client("sts").get_caller_identity()["Account"],
        "VPC": vpc,
        "SUBNET": options.subnet[0],
        "SUBNETS": options.subnet,
        "AMI": find_ami(session, options.ami),
        "TLS": str(int(options.tls or has_authority(cluster))),
        "TOKEN_FOLDER": f"~/.ray/{cluster}",
        "HEAD_TYPE": instances.pop("head"),
        "WORKER_TYPES": sorted(set(instances.values())),
        "OPERATORS": options.operator or [caller_arn(session)],
        "KMS_KEYS": keys,
    }
    return values | image_values(options.image, options.region), [text for text in advice if text]


def image_values(image: str, region: str) -> Values:
    """Return the placeholders of the image; one on ECR may be in another region or account."""
    registry, _, repository = image.partition("@")[0].partition("/")
    account, *_, registry_region = registry.removesuffix(".amazonaws.com").split(".")
    return {
        "IMAGE": image,
        "REGISTRY": registry,
        "REGISTRY_REGION": registry_region if ".dkr.ecr." in registry else region,
        "REPOSITORY": f"arn:aws:ecr:{registry_region}:{account}:repository/{repository.partition(':')[0]}",
    }


def launch_values(values: Values, group: str) -> Values:
    """Return the placeholders of the security group, and of all that nodes may be launched with."""
    resources = [f"security-group/{group}", f"key-pair/{values['CLUSTER']}", "spot-instances-request/*"]
    resources += [f"subnet/{subnet}" for subnet in values["SUBNETS"]]
    resources = [f":image/{values['AMI']}", *(f"{values['ACCOUNT']}:{resource}" for resource in resources)]
    names = [f"arn:aws:ec2:{values['REGION']}:{resource}" for resource in resources]
    return {"SECURITY_GROUP": group, "LAUNCH_RESOURCES": names}


def find_ami(session: boto3.Session, ami: str) -> str:
    """Return the id of a machine image that is given by it or by a parameter of Systems Manager."""
    if ami.startswith("ami-"):
        return ami
    return str(session.client("ssm").get_parameter(Name=ami)["Parameter"]["Value"])


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


def check_buckets(session: boto3.Session, buckets: set[str]) -> tuple[list[str], list[str]]:
    """Return the customer's KMS keys of the buckets, and advice. Raise UserError for a bucket that does not exist."""
    s3, keys, advice = session.client("s3"), set(), []
    own = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    for bucket in sorted(buckets):
        try:
            region = s3.get_bucket_location(Bucket=bucket)["LocationConstraint"] or "us-east-1"
            keys |= set(bucket_keys(session, bucket))
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchBucket":
                raise UserError(f"s3://{bucket} does not exist. Create it, or correct --photos or --root.") from error
            advice.append(f"s3://{bucket} could not be checked ({error}).")
            continue
        if region != session.region_name:
            advice.append(
                f"s3://{bucket} is in {region}: transfer between regions costs 0.02 dollars per GB, and time."
            )
        if bucket not in own:
            advice.append(
                f"s3://{bucket} is another account's: its policy must allow the cluster's head and worker roles."
            )
    return sorted(keys), advice


def bucket_keys(session: boto3.Session, bucket: str) -> Iterator[str]:
    """Yield the ARNs of the customer's KMS keys with which a bucket encrypts by default."""
    try:
        encryption = session.client("s3").get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]
    except ClientError as error:
        if error.response["Error"]["Code"] == "ServerSideEncryptionConfigurationNotFoundError":
            return
        raise
    for rule in encryption["Rules"]:
        if key := rule.get("ApplyServerSideEncryptionByDefault", {}).get("KMSMasterKeyID"):
            described = session.client("kms").describe_key(KeyId=key)["KeyMetadata"]
            if described["KeyManager"] == "CUSTOMER":  # AWS' own keys allow everyone who may use the bucket
                yield described["Arn"]


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


def has_authority(cluster: str) -> bool:
    """Return True if nodes have certificates: the cluster was prepared with --tls."""
    return token_file(cluster).with_name("ca.key").exists()


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


def create_budget(budgets: Any, account: str, cluster: str, dollars: float, email: str) -> None:
    """Create or replace a monthly budget of what carries the cluster's tag, with alarms by e-mail."""
    alarm = {"NotificationType": "ACTUAL", "ComparisonOperator": "GREATER_THAN", "ThresholdType": "PERCENTAGE"}
    subscribers = [{"SubscriptionType": "EMAIL", "Address": email}]
    with suppress(budgets.exceptions.NotFoundException):
        budgets.delete_budget(AccountId=account, BudgetName=cluster)
    budgets.create_budget(
        AccountId=account,
        Budget={
            "BudgetName": cluster,
            "BudgetType": "COST",
            "TimeUnit": "MONTHLY",
            "BudgetLimit": {"Amount": str(dollars), "Unit": "USD"},
            "CostFilters": {"TagKeyValue": [f"user:ray-cluster-name${cluster}"]},
        },
        NotificationsWithSubscribers=[
            {"Notification": {**alarm, "Threshold": share}, "Subscribers": subscribers} for share in ALARMS
        ],
    )


def read_template() -> Values:
    """Return the content of aws.yaml, with its placeholders. Raise UserError for a key that is given twice."""
    file = FOLDER / "aws.yaml"
    values: Values = yaml_file.parse(file.read_text().replace("${", "$${"), str(file), plain=yaml.safe_load)
    return values


def remove(session: boto3.Session, cluster: str, subnet: str, key: Path) -> None:
    """Delete everything created except the token. Raise UserError if the cluster has nodes."""
    ec2 = session.client("ec2")
    states = {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "shutting-down"]}
    nodes = ec2.describe_instances(Filters=[{"Name": "tag:ray-cluster-name", "Values": [cluster]}, states])
    if nodes["Reservations"]:
        raise UserError(
            f"the cluster {cluster} still has nodes. Run `ray down {CLUSTER_FILE}` and wait until they are terminated."
        )
    remove_roles(session.client("iam"), cluster)
    (description,) = ec2.describe_subnets(SubnetIds=[subnet])["Subnets"]
    if group := find_group(ec2, description["VpcId"], cluster):
        ec2.delete_security_group(GroupId=group)
    ec2.delete_key_pair(KeyName=cluster)
    key.unlink(missing_ok=True)
    budgets, account = session.client("budgets"), session.client("sts").get_caller_identity()["Account"]
    with suppress(budgets.exceptions.NotFoundException):
        budgets.delete_budget(AccountId=account, BudgetName=cluster)


if __name__ == "__main__":
    cli.main(main)
