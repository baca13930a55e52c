"""cluster/prepare_aws.py and cluster/iam: what is made, once and for no more than it needs, and what is refused."""

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

from tests.helpers.aws import Place, account

POLICIES = [("worker", "worker"), ("head", "worker"), ("head", "head"), ("operator", "operator")]
"""Role and policy."""


@pytest.fixture(scope="module")
def place(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with account(tmp_path_factory.mktemp("home")) as place:
        place.prepare().check_returncode()
        yield place


def statements(role: str, policy: str) -> list[dict[str, Any]]:
    """What a policy says, every action and resource in a list."""
    text = boto3.client("iam").get_role_policy(RoleName=f"carclass-{role}", PolicyName=policy)["PolicyDocument"]
    return [{**each, **{key: listed(each[key]) for key in ("Action", "Resource")}} for each in text["Statement"]]


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def complaints(said: list[dict[str, Any]]) -> list[str]:
    """What cfn-lint finds, resources that don't go with their action included."""
    policy = {"PolicyDocument": {"Version": "2012-10-17", "Statement": said}}
    template = {"Resources": {"Policy": {"Type": "AWS::IAM::ManagedPolicy", "Properties": policy}}}
    arguments = ManualArgs(regions=["us-east-1"], include_checks=["I3510"])
    return [f"{match.rule.id}: {match.message}" for match in lint(json.dumps(template), config=arguments)]


def wildcards(said: list[dict[str, Any]]) -> list[str]:
    """Actions with a wildcard, and those for every resource that AWS would let be limited to some."""
    known = load_resource(AdditionalSpecs, "Policies.json")
    found = []
    for action, resource in ((a, r) for each in said for a in each["Action"] for r in each["Resource"]):
        service, _, name = action.partition(":")
        if "*" in action or (resource == "*" and known[service]["Actions"][name.lower()].get("Resources")):
            found.append(action)
    return found


@pytest.mark.parametrize(("role", "policy"), POLICIES)
def test_a_linter_finds_nothing_in_a_policy(place: Place, role: str, policy: str):
    assert complaints(statements(role, policy)) == []


@pytest.mark.parametrize(
    ("action", "resource"),
    [("s3:GetObjects", "arn:aws:s3:::b/*"), ("s3:GetObject", "b/*"), ("ec2:RunInstances", "arn:aws:s3:::b/*")],
)
def test_the_linter_finds_what_aws_does_not_know(action: str, resource: str):
    assert complaints([{"Effect": "Allow", "Action": action, "Resource": resource}]) != []


@pytest.mark.parametrize(("role", "policy"), POLICIES)
def test_no_policy_allows_more_by_a_wildcard_than_aws_demands(place: Place, role: str, policy: str):
    assert wildcards(statements(role, policy)) == []


@pytest.mark.parametrize("action", ["s3:*", "s3:Get*", "*", "s3:GetObject"])
def test_a_wildcard_would_be_found(action: str):
    assert wildcards([{"Action": [action], "Resource": ["*"]}]) == [action]


@pytest.mark.parametrize(("role", "policy"), POLICIES)
def test_what_is_for_every_instance_has_a_condition(place: Place, role: str, policy: str):
    """Registering for sessions apart: an instance does that before it has a name."""
    free = [each["Action"] for each in statements(role, policy) if "Condition" not in each and "ec2:" in str(each)]
    allowed = [["ssm:UpdateInstanceInformation"], ["ec2:RunInstances"]]
    assert [actions for actions in free if actions not in allowed] == []


def test_nodes_touch_nothing_of_s3_but_what_is_below_their_prefixes(place: Place):
    said = [each for each in statements("worker", "worker") if each["Action"][0].startswith("s3:")]
    touched = {action: set() for each in said for action in each["Action"]}
    for each in said:
        for action in each["Action"]:
            touched[action] |= set(each["Resource"])
    root, photos = "arn:aws:s3:::my-bucket/team/carclass/*", "arn:aws:s3:::my-bucket/photos/*"
    folders = {"arn:aws:s3:::my-bucket/team/", "arn:aws:s3:::my-bucket/team/carclass/"}
    assert touched == {
        "s3:ListBucket": {"arn:aws:s3:::my-bucket"},
        "s3:GetObject": {root, photos},
        "s3:PutObject": {root, *folders},
        "s3:DeleteObject": {root},
        "s3:AbortMultipartUpload": {root},
    }
    listed = [each["Condition"]["StringLikeIfExists"]["s3:prefix"] for each in said if "Condition" in each]
    assert sorted(listed) == ["photos/*", "team/carclass/*"]


@pytest.mark.parametrize(("role", "passed"), [("head", "worker"), ("operator", "head")])
def test_who_launches_nodes_gives_them_one_role(place: Place, role: str, passed: str):
    (grant,) = (each for each in statements(role, role) if "iam:PassRole" in each["Action"])
    assert grant["Resource"] == [f"arn:aws:iam::123456789012:role/carclass-{passed}"]
    assert grant["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}


def test_launching_is_limited_to_what_the_file_names(place: Place):
    parts = next(each for each in statements("head", "head") if each["Sid"] == "LaunchWithOurParts")["Resource"]
    node = yaml.safe_load((place.home / "build" / "aws.yaml").read_text())["available_node_types"]["head"][
        "node_config"
    ]
    network = node["NetworkInterfaces"][0]
    named = [f"image/{node['ImageId']}", f"key-pair/{node['KeyName']}", f"security-group/{network['Groups'][0]}"]
    named += ["spot-instances-request/*", f"subnet/{place.subnet}"]
    assert sorted(part.split(":")[5] for part in parts) == sorted(named)


def test_every_placeholder_is_filled_in(place: Place):
    written = (place.home / "build" / "aws.yaml").read_text()
    assert re.findall(r"\$\{(?!LIKE_THIS)\w+\}", written) == []
    said = json.dumps([statements(*each) for each in POLICIES])
    assert set(re.findall(r"\$\{[^}]*\}", said)) == {"${aws:userid}"}


def test_token_and_key_are_readable_by_their_owner_alone(place: Place):
    files = [place.home / ".ray" / "auth_token", place.home / ".ssh" / "carclass.pem"]
    assert [oct(file.stat().st_mode & 0o777) for file in files] == ["0o600", "0o600"]
    assert len(files[0].read_text()) == 64


def test_a_second_time_nothing_is_made_twice(place: Place):
    files = [place.home / name for name in ("build/aws.yaml", ".ray/auth_token", ".ssh/carclass.pem")]
    before = [file.read_text() for file in files]
    place.recorder.kept.clear()
    place.prepare().check_returncode()
    assert [file.read_text() for file in files] == before
    groups = [group["GroupName"] for group in boto3.client("ec2").describe_security_groups()["SecurityGroups"]]
    assert groups.count("carclass") == 1


def test_an_image_without_a_digest_is_refused(place: Place):
    ended = place.prepare(image="registry.example/carclass:latest")
    assert (ended.returncode, "names no digest" in ended.stderr) == (2, True)


def test_a_public_subnet_is_refused(place: Place):
    ended = place.prepare("--subnet", place.public)
    assert (ended.returncode, f"{place.public} gives public IP addresses" in ended.stderr) == (2, True)


def test_a_whole_bucket_is_refused(place: Place):
    ended = place.prepare("--root", "s3://my-bucket")
    assert (ended.returncode, "give s3://bucket/prefix" in ended.stderr) == (2, True)


def test_an_image_elsewhere_than_in_ecr_needs_no_right_there(place: Place):
    try:
        place.prepare(image=f"registry.example/carclass@sha256:{'ab' * 32}").check_returncode()
        assert "ecr:" not in str(statements("worker", "worker"))
    finally:
        place.prepare().check_returncode()


def test_all_that_was_made_is_removed(place: Place):
    def made() -> list[str]:
        ec2, iam = boto3.client("ec2"), boto3.client("iam")
        names = [group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]]
        names += [key["KeyName"] for key in ec2.describe_key_pairs()["KeyPairs"]]
        names += [role["RoleName"] for role in iam.list_roles()["Roles"]]
        names += [profile["InstanceProfileName"] for profile in iam.list_instance_profiles()["InstanceProfiles"]]
        return [name for name in names if name.startswith("carclass")]

    assert len(made()) == 7
    place.prepare("--remove").check_returncode()
    assert made() == []
    assert not (place.home / ".ssh" / "carclass.pem").exists()
