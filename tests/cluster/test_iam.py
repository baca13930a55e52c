"""cluster/prepare_aws.py and cluster/iam: created resources, least privilege and refused options."""

import json
import re
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
import yaml
from cfnlint.api import ManualArgs, lint
from cfnlint.data import AdditionalSpecs
from cfnlint.helpers import load_resource

from tests.helpers.aws import Account, make_account

POLICIES = [("worker", "worker"), ("head", "worker"), ("head", "head"), ("operator", "operator")]
"""Role and policy."""


@pytest.fixture(scope="module")
def account(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    with make_account(tmp_path_factory.mktemp("home")) as account:
        account.prepare().check_returncode()
        yield account


def statements(role: str, policy: str) -> list[dict[str, Any]]:
    """Return a policy's statements, with actions and resources as lists."""
    document = boto3.client("iam").get_role_policy(RoleName=f"carclass-{role}", PolicyName=policy)["PolicyDocument"]
    return [{**each, **{key: as_list(each[key]) for key in ("Action", "Resource")}} for each in document["Statement"]]


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def lint_errors(statements: list[dict[str, Any]]) -> list[str]:
    """Return the findings of cfn-lint, including resources that do not match their action."""
    policy = {"PolicyDocument": {"Version": "2012-10-17", "Statement": statements}}
    template = {"Resources": {"Policy": {"Type": "AWS::IAM::ManagedPolicy", "Properties": policy}}}
    arguments = ManualArgs(regions=["us-east-1"], include_checks=["I3510"])
    return [f"{match.rule.id}: {match.message}" for match in lint(json.dumps(template), config=arguments)]


def wildcards(statements: list[dict[str, Any]]) -> list[str]:
    """Return actions with a wildcard, and actions on all resources that AWS can limit to some."""
    services = load_resource(AdditionalSpecs, "Policies.json")
    actions = []
    for action, resource in ((a, r) for each in statements for a in each["Action"] for r in each["Resource"]):
        service, _, name = action.partition(":")
        if "*" in action or (resource == "*" and services[service]["Actions"][name.lower()].get("Resources")):
            actions.append(action)
    return actions


@pytest.mark.parametrize(("role", "policy"), POLICIES)
def test_policies_pass_the_linter(account: Account, role: str, policy: str):
    assert lint_errors(statements(role, policy)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "resource"),
    [("s3:GetObjects", "arn:aws:s3:::b/*"), ("s3:GetObject", "b/*"), ("ec2:RunInstances", "arn:aws:s3:::b/*")],
)
def test_the_linter_finds_unknown_actions_and_resources(action: str, resource: str):
    assert lint_errors([{"Effect": "Allow", "Action": action, "Resource": resource}]) != []


@pytest.mark.parametrize(("role", "policy"), POLICIES)
def test_no_policy_has_an_avoidable_wildcard(account: Account, role: str, policy: str):
    assert wildcards(statements(role, policy)) == []


@pytest.mark.parametrize("action", ["s3:*", "s3:Get*", "*", "s3:GetObject"])
def test_avoidable_wildcards_are_found(action: str):
    assert wildcards([{"Action": [action], "Resource": ["*"]}]) == [action]


@pytest.mark.parametrize(("role", "policy"), POLICIES)
def test_statements_on_all_instances_have_a_condition(account: Account, role: str, policy: str):
    """Except registration for sessions, which precedes an instance's tags."""
    unconditional = [
        each["Action"] for each in statements(role, policy) if "Condition" not in each and "ec2:" in str(each)
    ]
    allowed = [["ssm:UpdateInstanceInformation"], ["ec2:RunInstances"]]
    assert [actions for actions in unconditional if actions not in allowed] == []


def test_nodes_access_only_their_prefixes_on_s3(account: Account):
    on_s3 = [each for each in statements("worker", "worker") if each["Action"][0].startswith("s3:")]
    accessible = {action: set() for each in on_s3 for action in each["Action"]}
    for each in on_s3:
        for action in each["Action"]:
            accessible[action] |= set(each["Resource"])
    root, photos = "arn:aws:s3:::my-bucket/team/carclass/*", "arn:aws:s3:::my-bucket/photos/*"
    folders = {"arn:aws:s3:::my-bucket/team/", "arn:aws:s3:::my-bucket/team/carclass/"}
    assert accessible == {
        "s3:ListBucket": {"arn:aws:s3:::my-bucket"},
        "s3:GetObject": {root, photos},
        "s3:PutObject": {root, *folders},
        "s3:DeleteObject": {root},
        "s3:AbortMultipartUpload": {root},
    }
    prefixes = [each["Condition"]["StringLikeIfExists"]["s3:prefix"] for each in on_s3 if "Condition" in each]
    assert sorted(prefixes) == ["photos/*", "team/carclass/*"]


@pytest.mark.parametrize(("role", "passed"), [("head", "worker"), ("operator", "head")])
def test_a_launching_role_can_pass_one_role_only(account: Account, role: str, passed: str):
    (grant,) = (each for each in statements(role, role) if "iam:PassRole" in each["Action"])
    assert grant["Resource"] == [f"arn:aws:iam::123456789012:role/carclass-{passed}"]
    assert grant["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}


def test_launching_is_limited_to_resources_of_the_cluster_file(account: Account):
    parts = next(each for each in statements("head", "head") if each["Sid"] == "LaunchWithClusterResources")["Resource"]
    node = yaml.safe_load((account.home / "build" / "aws.yaml").read_text())["available_node_types"]["head"][
        "node_config"
    ]
    network = node["NetworkInterfaces"][0]
    named = [f"image/{node['ImageId']}", f"key-pair/{node['KeyName']}", f"security-group/{network['Groups'][0]}"]
    named += ["spot-instances-request/*", f"subnet/{account.subnet}"]
    assert sorted(part.split(":")[5] for part in parts) == sorted(named)


def test_every_placeholder_is_filled_in(account: Account):
    written = (account.home / "build" / "aws.yaml").read_text()
    assert re.findall(r"\$\{(?!LIKE_THIS)\w+\}", written) == []
    policies = json.dumps([statements(*each) for each in POLICIES])
    assert set(re.findall(r"\$\{[^}]*\}", policies)) == {"${aws:userid}"}


def test_token_and_key_are_readable_by_their_owner_only(account: Account):
    files = [account.home / ".ray" / "carclass" / "auth_token", account.home / ".ssh" / "carclass.pem"]
    assert [oct(file.stat().st_mode & 0o777) for file in files] == ["0o600", "0o600"]
    assert oct(files[0].parent.stat().st_mode & 0o777) == "0o700"
    assert len(files[0].read_text()) == 64


@pytest.mark.slow
def test_a_second_run_creates_nothing_twice(account: Account):
    files = [account.home / name for name in ("build/aws.yaml", ".ray/carclass/auth_token", ".ssh/carclass.pem")]
    before = [file.read_text() for file in files]
    account.recorder.requests.clear()
    account.prepare().check_returncode()
    assert [file.read_text() for file in files] == before
    groups = [group["GroupName"] for group in boto3.client("ec2").describe_security_groups()["SecurityGroups"]]
    assert groups.count("carclass") == 1


@pytest.mark.slow  # 5 s
def test_a_group_that_an_earlier_run_left_without_its_rule_gets_it(account: Account):
    def find_group() -> dict[str, Any]:
        names = [{"Name": "group-name", "Values": ["carclass"]}]
        (group,) = boto3.client("ec2").describe_security_groups(Filters=names)["SecurityGroups"]
        return group

    before = find_group()
    boto3.client("ec2").revoke_security_group_ingress(
        GroupId=before["GroupId"],
        IpPermissions=[{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": before["GroupId"]}]}],
    )
    assert find_group()["IpPermissions"] == []
    account.prepare().check_returncode()
    assert find_group()["IpPermissions"] == before["IpPermissions"]


def test_an_image_without_a_digest_is_refused(account: Account):
    done = account.prepare(image="registry.example/carclass:latest")
    assert (done.returncode, "has no digest" in done.stderr) == (2, True)


def test_a_public_subnet_is_refused(account: Account):
    done = account.prepare(subnet=account.public)
    assert (done.returncode, f"{account.public} assigns public IP addresses" in done.stderr) == (2, True)


def test_a_whole_bucket_is_refused(account: Account):
    done = account.prepare("--root", "s3://my-bucket")
    assert (done.returncode, "give s3://bucket/prefix" in done.stderr) == (2, True)


@pytest.mark.slow
def test_an_image_outside_of_ecr_needs_no_ecr_permissions(account: Account):
    try:
        account.prepare(image=f"registry.example/carclass@sha256:{'ab' * 32}").check_returncode()
        assert "ecr:" not in str(statements("worker", "worker"))
    finally:
        account.prepare().check_returncode()


@pytest.mark.slow
def test_remove_deletes_everything_created(account: Account):
    assert len(account.created()) == 7
    account.prepare("--remove").check_returncode()
    assert account.created() == []
    assert not (account.home / ".ssh" / "carclass.pem").exists()
