"""Roles of the cluster on AWS: those of its nodes and its operators', with the policies of iam/."""

import json
import string
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from carclass.errors import UserError

FOLDER = Path(__file__).parent / "iam"
POLICIES = {"worker": ["worker"], "head": ["worker", "head"], "operator": ["operator"]}
"""Policies of each role, by file names in iam/."""
SESSION_S = 12 * 3600
"""Longest session of an operator who takes the role directly; one who has another role gets an hour."""
Values = dict[str, Any]


class Prepared(NamedTuple):
    """Cluster as its existing roles allow it; "" and no operators for what they do not tell."""

    region: str
    photos: str
    root: str
    operators: list[str]
    """ARNs of those who may take the operator's role."""


def read_prepared(iam: Any, cluster: str) -> Prepared:
    """Return the region, prefixes and operators of the existing roles.

    They are read from the policies: a tag cannot contain every prefix, and roles of earlier versions have none.
    """
    head = _read_resources(iam, f"{cluster}-head", "head")
    worker = _read_resources(iam, f"{cluster}-worker", "worker")
    region = head.get("LaunchWorkers", ":::").split(":")[3]  # arn:aws:ec2:us-east-1:123456789012:instance/*
    photos, root = (
        f"s3://{worker[name].split(':::')[-1].removesuffix('/*')}" if name in worker else ""
        for name in ("ReadPhotos", "ReadAndWriteRoot")
    )
    return Prepared(region, photos, root, _read_operators(iam, f"{cluster}-operator"))


def _read_resources(iam: Any, role: str, policy: str) -> dict[str, str]:
    """Return the statements' ids and resources of a role's policy, of those with one resource."""
    try:
        document = iam.get_role_policy(RoleName=role, PolicyName=policy)["PolicyDocument"]
    except iam.exceptions.NoSuchEntityException:
        return {}
    return {each["Sid"]: each["Resource"] for each in document["Statement"] if isinstance(each["Resource"], str)}


def _read_operators(iam: Any, role: str) -> list[str]:
    """Return the ARNs that a role trusts; IAM shows deleted users and roles as ids, which it does not take again."""
    try:
        statements = iam.get_role(RoleName=role)["Role"]["AssumeRolePolicyDocument"]["Statement"]
    except iam.exceptions.NoSuchEntityException:
        return []
    trusted = [str(each.get("Principal", {}).get("AWS", "")) for each in statements]
    return [arn for arn in trusted if arn.startswith("arn:")]


def check_region(prepared: Prepared, cluster: str, region: str) -> None:
    """Raise UserError if the roles, which an account has once for all regions, are of a cluster in another one."""
    if prepared.region not in ("", region):
        raise UserError(
            f"--region {region}: the cluster {cluster} of this account was prepared in {prepared.region}, and its "
            f"roles and budget are of all regions. Give --region {prepared.region}, or remove it there first: "
            f"`ray down`, then `python cluster/prepare_aws.py --region {prepared.region} --remove`."
        )


def check_prefixes(prepared: Prepared, cluster: str, photos: str, root: str) -> None:
    """Raise UserError if the existing roles allow other prefixes."""
    changed = [
        f"{name} {former} (now {given})"
        for name, former, given in (("--photos", prepared.photos, photos), ("--root", prepared.root, root))
        if former not in ("", given.rstrip("/"))
    ]
    if changed:
        raise UserError(
            f"the cluster {cluster} was prepared for {' and '.join(changed)}: running nodes would lose access to the "
            "former prefix. Give the former one, or --replace."
        )


def create_roles(iam: Any, values: Values) -> None:
    """Create or update the roles and their policies, and the instance profiles of the nodes."""
    nodes = [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]
    for kind, policies in POLICIES.items():
        name = f"{values['CLUSTER']}-{kind}"
        trust = _trust_operators(values["OPERATORS"]) if kind == "operator" else nodes
        document = json.dumps({"Version": "2012-10-17", "Statement": trust})
        with suppress(iam.exceptions.EntityAlreadyExistsException):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=document)
        iam.update_assume_role_policy(RoleName=name, PolicyDocument=document)
        for policy in policies:
            text = json.dumps(read_policy(policy, values))
            iam.put_role_policy(RoleName=name, PolicyName=policy, PolicyDocument=text)
        if kind == "operator":
            iam.update_role(RoleName=name, MaxSessionDuration=SESSION_S)
            continue
        with suppress(iam.exceptions.EntityAlreadyExistsException):
            iam.create_instance_profile(InstanceProfileName=name)
        with suppress(iam.exceptions.LimitExceededException):  # a profile has at most one role
            iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    # An account needs this service-linked role once to request spot instances.
    if not iam.list_roles(PathPrefix="/aws-service-role/spot.amazonaws.com/")["Roles"]:
        iam.create_service_linked_role(AWSServiceName="spot.amazonaws.com")


def caller_arn(session: Any) -> str:
    """Return the ARN of the user or role of a session's credentials, as a trust policy names it."""
    arn = str(session.client("sts").get_caller_identity()["Arn"])
    kind, *rest = arn.split(":")[5].split("/")
    if kind == "assumed-role":  # without the role's path
        return str(session.client("iam").get_role(RoleName=rest[0])["Role"]["Arn"])
    return arn


def _trust_operators(arns: list[str]) -> list[Values]:
    """Return the statements that let users, after MFA, and roles take the operator's role.

    A role's session does not tell of MFA: its identity provider requires it.
    """
    statements = []
    for arn in arns:
        statement: Values = {"Effect": "Allow", "Principal": {"AWS": arn}, "Action": "sts:AssumeRole"}
        if ":role/" not in arn:
            statement["Condition"] = {"Bool": {"aws:MultiFactorAuthPresent": "true"}}
        statements.append(statement)
    return statements


def read_policy(name: str, values: Values) -> Values:
    """Return a policy of iam/ with its placeholders filled in, without statements on resources that do not exist."""
    policy: Values = json.loads(fill((FOLDER / f"{name}.json").read_text(), values))
    absent = {"Ecr": ".dkr.ecr." not in values["REGISTRY"], "Kms": not values["KMS_KEYS"]}
    unused = tuple(service for service, is_absent in absent.items() if is_absent)
    policy["Statement"] = [each for each in policy["Statement"] if not each["Sid"].startswith(unused)]
    return policy


def fill(text: str, values: Values) -> str:
    """Fill in the ${PLACEHOLDERS} of a text; a quoted placeholder with a list as value becomes a list."""
    for name in (name for name in values if isinstance(values[name], list)):
        text = text.replace(f'"${{{name}}}"', json.dumps(values[name]))
    return string.Template(text).safe_substitute(values)  # leaves $RAY_HEAD_IP and ${aws:userid}


def remove_roles(iam: Any, cluster: str) -> list[str]:
    """Delete the roles and the instance profiles. Return the names of the deleted roles."""
    deleted = []
    for kind, policies in POLICIES.items():
        name = f"{cluster}-{kind}"
        calls = [(iam.delete_role_policy, {"RoleName": name, "PolicyName": policy}) for policy in policies]
        calls.insert(0, (iam.remove_role_from_instance_profile, {"InstanceProfileName": name, "RoleName": name}))
        calls.insert(1, (iam.delete_instance_profile, {"InstanceProfileName": name}))
        for call, arguments in calls:
            with suppress(iam.exceptions.NoSuchEntityException):  # an earlier run may have ended before it
                call(**arguments)
        with suppress(iam.exceptions.NoSuchEntityException):
            iam.delete_role(RoleName=name)
            deleted.append(name)
    return deleted
