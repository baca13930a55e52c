"""Preparation of a cluster on AWS before `ray up`: security group, roles, SSH key, token and build/aws.yaml.

  python cluster/prepare_aws.py --region us-east-1 --subnet subnet-1 --photos s3://my-bucket/photos \\
      --root s3://my-bucket/carclass --image 123456789012.dkr.ecr.us-east-1.amazonaws.com/carclass@sha256:…
  ray up build/aws.yaml

Run by an administrator, once and after changes; it is idempotent. An account has one cluster, in one region: preparing
it in another one is refused. After `ray down build/aws.yaml`, `--region us-east-1 --remove` deletes everything created,
except the token. Users start and use the cluster with the role carclass-operator. Nodes may read below --photos (labels
included), and read and write below --root. They can also list the names of other objects in these buckets, because S3
reports a missing object only to those who may list.
"""

import argparse
import os
import secrets
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import yaml
from aws_errors import aws_error_report, is_denied
from aws_images import ECR, check_image, find_ami, image_values, is_of_region
from aws_network import ECR_ENDPOINTS, ENDPOINTS, check_subnets, create_group, find_groups
from aws_options import parse_options
from aws_roles import caller_arn, check_prefixes, check_region, create_roles, fill, read_prepared, remove_roles
from aws_storage import check_buckets, check_photos, storage_values
from botocore.exceptions import ClientError

from carclass.config import cli, yaml_file
from carclass.errors import UserError

FOLDER = Path(__file__).parent
CLUSTER_FILE = Path("build/aws.yaml")
PROGRAMS = ("aws", "session-manager-plugin", "ssh", "rsync")
"""Needed by `ray up`."""
ALARMS = (50, 80, 100)
"""Shares of the budget in percent at which AWS writes an e-mail."""
Values = dict[str, Any]


def main() -> None:
    """Create or remove the cluster's AWS resources."""
    options, cluster = parse_options(__doc__ or ""), read_template()["cluster_name"]
    with aws_error_report():
        session = boto3.Session(region_name=options.region)
        if options.remove:
            remove(session, cluster)
        else:
            prepare(session, options, cluster)


def prepare(session: boto3.Session, options: argparse.Namespace, cluster: str) -> None:
    """Create or update the cluster's AWS resources and its files, and print the next commands."""
    values, advice = check(session, options, cluster)
    ec2, key = session.client("ec2"), key_file(cluster)
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


def check(session: boto3.Session, options: argparse.Namespace, cluster: str) -> tuple[Values, list[str]]:
    """Return the placeholders of aws.yaml and iam/, and advice. Raise UserError for what would not work."""
    values = storage_values(options.photos, options.root)
    prepared = read_prepared(session.client("iam"), cluster)
    check_region(prepared, cluster, options.region)
    if not options.replace:
        check_prefixes(prepared, cluster, options.photos, options.root)
    types = read_template()["available_node_types"]
    instances = {name: each["node_config"]["InstanceType"] for name, each in types.items()}
    services = (*ENDPOINTS, *ECR_ENDPOINTS) if ECR in options.image else ENDPOINTS
    vpc, *advice = check_subnets(session.client("ec2"), options.subnet, services, instances.values())
    keys, storage_advice = check_buckets(session, {values["PHOTOS_BUCKET"], values["ROOT_BUCKET"]})
    ami, ami_note = find_ami(session, options.ami, CLUSTER_FILE)
    advice += [*storage_advice, check_photos(session, options.photos), check_image(session, options.image), ami_note]
    advice += check_machine(cluster, options.tls)
    values |= {
        "CLUSTER": cluster,
        "REGION": options.region,
        "ACCOUNT": session.client("sts").get_caller_identity()["Account"],
        "VPC": vpc,
        "SUBNET": options.subnet[0],
        "SUBNETS": options.subnet,
        "AMI": ami,
        "TLS": str(int(options.tls or has_authority(cluster))),
        "TOKEN_FOLDER": f"~/.ray/{cluster}",
        "HEAD_TYPE": instances.pop("head"),
        "WORKER_TYPES": sorted(set(instances.values())),
        "OPERATORS": options.operator or prepared.operators or [caller_arn(session)],
        "KMS_KEYS": keys,
    }
    return values | image_values(options.image, options.region), [text for text in advice if text]


def check_machine(cluster: str, tls: bool) -> list[str]:
    """Return advice on this machine's programs, and on its authority for TLS."""
    advice = []
    if absent := [name for name in PROGRAMS if shutil.which(name) is None]:
        advice.append(f"`ray up` needs {', '.join(absent)} on this machine.")
    if has_authority(cluster) and not tls:
        files = f"{token_file(cluster).parent}/ca.*"
        advice.append(
            f"TLS between nodes stays on, as by --tls before. To turn it off, delete {files} and run this again."
        )
    return advice


def launch_values(values: Values, group: str) -> Values:
    """Return the placeholders of the security group, and of all that nodes may be launched with."""
    resources = [f"security-group/{group}", f"key-pair/{values['CLUSTER']}", "spot-instances-request/*"]
    resources += [f"subnet/{subnet}" for subnet in values["SUBNETS"]]
    resources = [f":image/{values['AMI']}", *(f"{values['ACCOUNT']}:{resource}" for resource in resources)]
    names = [f"arn:aws:ec2:{values['REGION']}:{resource}" for resource in resources]
    return {"SECURITY_GROUP": group, "LAUNCH_RESOURCES": names}


def key_file(cluster: str) -> Path:
    """Return the file of the cluster's SSH key, as aws.yaml names it."""
    return Path(f"~/.ssh/{cluster}.pem")


def create_key(ec2: Any, cluster: str, path: Path) -> None:
    """Create the cluster's SSH key on EC2 and in a local file. Raise UserError if only one of the two exists."""
    pairs = has_key_pair(ec2, cluster)
    if pairs != path.exists():
        present, absent = ("on EC2", f"at {path}") if pairs else (f"at {path}", "on EC2")
        raise UserError(f"the SSH key {cluster} exists {present} but not {absent}. Copy it or delete it.")
    if not pairs:
        write_secret(path, ec2.create_key_pair(KeyName=cluster, KeyType="ed25519")["KeyMaterial"])


def has_key_pair(ec2: Any, cluster: str) -> bool:
    """Return True if EC2 has the cluster's SSH key in this region."""
    return bool(ec2.describe_key_pairs(Filters=[{"Name": "key-name", "Values": [cluster]}])["KeyPairs"])


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


def remove(session: boto3.Session, cluster: str) -> None:
    """Delete everything created except the token, and print it.

    Raise UserError if the cluster has nodes or is of another region. The roles, which tell the region, are the last: a
    run that was interrupted is repeated with the same checks.
    """
    ec2, iam, region = session.client("ec2"), session.client("iam"), session.client("ec2").meta.region_name
    check_region(read_prepared(iam, cluster), cluster, region)
    check_no_nodes(ec2, cluster)
    files, deleted = [CLUSTER_FILE] if is_of_region(CLUSTER_FILE, region) else [], []
    for group in find_groups(ec2, cluster):
        ec2.delete_security_group(GroupId=group)
        deleted.append(f"security group {group}")
    if has_key_pair(ec2, cluster):  # otherwise the file is of another region's cluster, or of another account's
        ec2.delete_key_pair(KeyName=cluster)
        deleted.append(f"SSH key {cluster} on EC2")
        files.append(key_file(cluster).expanduser())
    account = session.client("sts").get_caller_identity()["Account"]
    budgets, budget_left = remove_budget(session.client("budgets"), account, cluster)
    deleted += budgets + [f"role {name}" for name in remove_roles(iam, cluster)]
    for file in filter(Path.exists, files):
        file.unlink()
        deleted.append(str(file))
    print(f"Deleted in {region}: {', '.join(deleted) or 'nothing, as nothing was there'}.")
    left = [str(each) for each in (key_file(cluster).expanduser(), token_file(cluster).parent) if each.exists()]
    left += [*budget_left, "data on S3", "images"]
    print(f"Left: {', '.join(left)}. Delete what no other cluster or operator needs.")


def check_no_nodes(ec2: Any, cluster: str) -> None:
    """Raise UserError if the cluster has nodes."""
    states = {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "shutting-down"]}
    nodes = ec2.describe_instances(Filters=[{"Name": "tag:ray-cluster-name", "Values": [cluster]}, states])
    if nodes["Reservations"]:
        raise UserError(
            f"the cluster {cluster} still has nodes. Run `ray down {CLUSTER_FILE}` and wait until they are terminated."
        )


def remove_budget(budgets: Any, account: str, cluster: str) -> tuple[list[str], list[str]]:
    """Delete the budget. Return a text if it was deleted, and one if it may be left for want of billing rights."""
    try:
        budgets.delete_budget(AccountId=account, BudgetName=cluster)
    except budgets.exceptions.NotFoundException:
        return [], []
    except ClientError as error:
        if is_denied(error):
            return [], [f"a budget {cluster} if there is one (no permission to delete it)"]
        raise
    return [f"budget {cluster}"], []


if __name__ == "__main__":
    cli.main(main)
