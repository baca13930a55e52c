"""Roles of the cluster on AWS: those of its nodes and its operators', with the policies of iam/."""

import json
import string
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "iam"
POLICIES = {"worker": ["worker"], "head": ["worker", "head"], "operator": ["operator"]}
"""Policies of each role, by file names in iam/."""
SESSION_S = 12 * 3600
"""Longest session of an operator who takes the role directly; one who has another role gets an hour."""
Values = dict[str, Any]


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


def remove_roles(iam: Any, cluster: str) -> None:
    """Delete the roles and the instance profiles."""
    for kind, policies in POLICIES.items():
        name = f"{cluster}-{kind}"
        with suppress(iam.exceptions.NoSuchEntityException):
            iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=name)
            iam.delete_instance_profile(InstanceProfileName=name)
        with suppress(iam.exceptions.NoSuchEntityException):
            for policy in policies:
                iam.delete_role_policy(RoleName=name, PolicyName=policy)
            iam.delete_role(RoleName=name)
