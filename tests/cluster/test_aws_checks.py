"""Checks of cluster/prepare_aws.py before it creates anything, and values that it takes from the account."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
import yaml

from cluster.aws_roles import remove_roles
from tests.helpers.aws import IMAGE, Account, give_default_route, make_account

KEY = "arn:aws:kms:us-east-1:123456789012:key/"
ELSEWHERE = IMAGE.replace("123456789012", "999999999999").replace("us-east-1", "eu-west-1")


@pytest.fixture(scope="module")
def account(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    with make_account(tmp_path_factory.mktemp("home")) as account:
        yield account


def make_subnet(**target: str) -> tuple[str, str]:
    """Create a private subnet in a VPC of its own, with a default route to a target; return subnet and route table."""
    ec2 = boto3.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.8.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.8.0.0/24", AvailabilityZone="us-east-1a")["Subnet"]["SubnetId"]
    if target:
        return subnet, give_default_route(vpc, **target)
    (table,) = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["RouteTables"]
    return subnet, table["RouteTableId"]


def refuse(account: Account, text: str, *options: str, **kwargs: str) -> None:
    """Assert that prepare_aws.py refuses options with a text and creates nothing."""
    done = account.prepare(*options, **kwargs)
    assert (done.returncode, text in done.stderr) == (2, True), done.stderr
    assert not (account.home / "build").exists()


def prepare(account: Account, *options: str, **kwargs: str) -> subprocess.CompletedProcess:
    """Run prepare_aws.py and assert that it succeeds."""
    done = account.prepare(*options, **kwargs)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(autouse=True)
def no_file(account: Account) -> None:
    """Remove the file and the roles of an earlier test."""
    shutil.rmtree(account.home / "build", ignore_errors=True)
    remove_roles(boto3.client("iam"), "carclass")


def policy(role: str, name: str) -> dict[str, dict[str, Any]]:
    """Return the statements of a policy by their ids."""
    document = boto3.client("iam").get_role_policy(RoleName=f"carclass-{role}", PolicyName=name)["PolicyDocument"]
    return {each["Sid"]: each for each in document["Statement"]}


def test_a_subnet_without_nat_or_endpoints_is_refused_by_their_names(account: Account):
    subnet, _ = make_subnet()
    refuse(account, "no endpoint for s3, ec2, ssm, ssmmessages, ecr.api, ecr.dkr", subnet=subnet)


@pytest.mark.slow  # 5 s each
def test_endpoints_take_the_place_of_a_nat_gateway(account: Account):
    subnet, table = make_subnet()
    ec2 = boto3.client("ec2")
    (described,) = ec2.describe_subnets(SubnetIds=[subnet])["Subnets"]
    for name in ("ec2", "ssm", "ssmmessages", "ecr.api", "ecr.dkr"):
        service = f"com.amazonaws.us-east-1.{name}"
        ec2.create_vpc_endpoint(VpcId=described["VpcId"], ServiceName=service, VpcEndpointType="Interface")
    ec2.create_vpc_endpoint(VpcId=described["VpcId"], ServiceName="com.amazonaws.us-east-1.s3", RouteTableIds=[table])
    try:
        prepare(account, subnet=subnet)
    finally:
        account.prepare("--remove", subnet=subnet).check_returncode()


def test_a_subnet_behind_an_internet_gateway_is_refused(account: Account):
    gateway = boto3.client("ec2").create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    subnet, _ = make_subnet(GatewayId=gateway)
    refuse(account, "routes to an internet gateway", subnet=subnet)


def test_subnets_of_two_vpcs_are_refused(account: Account):
    refuse(account, "of several VPCs", "--subnet", make_subnet()[0])


def test_a_zone_without_an_instance_type_is_refused(account: Account):
    ec2 = boto3.client("ec2")
    (described,) = ec2.describe_subnets(SubnetIds=[account.subnet])["Subnets"]
    offers = ec2.describe_instance_type_offerings(
        LocationType="availability-zone", Filters=[{"Name": "instance-type", "Values": ["g6.xlarge"]}]
    )["InstanceTypeOfferings"]
    zones = {zone["ZoneName"] for zone in ec2.describe_availability_zones()["AvailabilityZones"]}
    (without, *_) = sorted(zones - {offer["Location"] for offer in offers})
    subnet = ec2.create_subnet(VpcId=described["VpcId"], CidrBlock="10.9.9.0/24", AvailabilityZone=without)
    done = account.prepare(subnet=subnet["Subnet"]["SubnetId"])
    assert (done.returncode, f"{without} offer(s) no " in done.stderr) == (2, True), done.stderr


def test_a_bucket_that_does_not_exist_is_refused(account: Account):
    refuse(account, "s3://no-such-bucket does not exist", "--root", "s3://no-such-bucket/carclass")


def test_a_budget_without_an_address_is_refused(account: Account):
    refuse(account, "give --budget and --email together", "--budget", "500")


@pytest.mark.slow
def test_a_bucket_in_another_region_is_advised_against(account: Account):
    place = {"LocationConstraint": "eu-west-1"}
    boto3.client("s3", region_name="eu-west-1").create_bucket(Bucket="far-away", CreateBucketConfiguration=place)
    boto3.client("s3", region_name="eu-west-1").put_object(Bucket="far-away", Key="photos/1.jpg", Body=b"photo")
    assert "s3://far-away is in eu-west-1" in prepare(account, "--photos", "s3://far-away/photos").stdout


@pytest.mark.slow
def test_without_a_gateway_endpoint_for_s3_its_command_is_advised(account: Account):
    assert "aws ec2 create-vpc-endpoint --vpc-id vpc-" in prepare(account).stdout


@pytest.mark.slow
def test_nodes_may_use_the_key_of_an_encrypted_bucket_through_s3_only(account: Account):
    s3, key = boto3.client("s3"), boto3.client("kms").create_key()["KeyMetadata"]["KeyId"]
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}}
    s3.create_bucket(Bucket="encrypted")
    s3.put_bucket_encryption(Bucket="encrypted", ServerSideEncryptionConfiguration={"Rules": [rule]})
    prepare(account, "--root", "s3://encrypted/carclass")
    statement = policy("worker", "worker")["KmsPhotosAndRoot"]
    assert (statement["Resource"], statement["Action"]) == ([f"{KEY}{key}"], ["kms:Decrypt", "kms:GenerateDataKey"])
    assert statement["Condition"] == {"StringLike": {"kms:ViaService": "s3.*.amazonaws.com"}}


@pytest.mark.slow
def test_an_image_of_another_region_and_account_can_be_pulled(account: Account, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(account.recorder, "denied", "DescribeImages")  # another account's, to this one
    assert "advice: --image could not be checked (AccessDeniedException" in prepare(account, image=ELSEWHERE).stdout
    statements = policy("worker", "worker")
    assert statements["EcrPull"]["Resource"] == "arn:aws:ecr:eu-west-1:999999999999:repository/carclass"
    assert statements["EcrLogin"]["Condition"] == {"StringEquals": {"aws:RequestedRegion": "eu-west-1"}}
    (login,) = (
        command
        for command in yaml.safe_load((account.home / "build" / "aws.yaml").read_text())["initialization_commands"]
        if "ecr" in command
    )
    assert "aws ecr get-login-password --region eu-west-1" in login


@pytest.mark.slow
def test_the_operators_role_trusts_the_given_users_after_mfa_and_roles(account: Account):
    arns = ["arn:aws:iam::123456789012:user/a", "arn:aws:iam::123456789012:role/b"]
    prepare(account, *(word for arn in arns for word in ("--operator", arn)))
    role = boto3.client("iam").get_role(RoleName="carclass-operator")["Role"]
    trusted = [
        (each["Principal"]["AWS"], "Condition" in each) for each in role["AssumeRolePolicyDocument"]["Statement"]
    ]
    assert (trusted, role["MaxSessionDuration"]) == ([(arns[0], True), (arns[1], False)], 43200)


@pytest.mark.slow
def test_without_operators_only_the_caller_is_trusted(account: Account):
    prepare(account)
    role = boto3.client("iam").get_role(RoleName="carclass-operator")["Role"]
    caller = boto3.client("sts").get_caller_identity()["Arn"]
    assert [each["Principal"] for each in role["AssumeRolePolicyDocument"]["Statement"]] == [{"AWS": caller}]


@pytest.mark.slow
def test_a_budget_of_the_clusters_tag_has_alarms(account: Account):
    for dollars in ("100", "500"):  # the second one replaces the first
        prepare(account, "--budget", dollars, "--email", "a@example.com")
    budgets = boto3.client("budgets")
    (budget,) = budgets.describe_budgets(AccountId="123456789012")["Budgets"]
    assert budget["BudgetLimit"]["Amount"] == "500.0"
    assert budget["CostFilters"] == {"TagKeyValue": ["user:ray-cluster-name$carclass"]}
    alarms = budgets.describe_notifications_for_budget(AccountId="123456789012", BudgetName="carclass")
    assert [alarm["Threshold"] for alarm in alarms["Notifications"]] == [50, 80, 100]


@pytest.mark.slow
def test_nodes_may_be_launched_in_every_given_subnet_and_no_other(account: Account):
    prepare(account, "--subnet", account.other)
    assert json.dumps(policy("head", "head")["LaunchWithClusterResources"]["Resource"]).count(":subnet/") == 2
    file = yaml.safe_load((account.home / "build" / "aws.yaml").read_text())
    assert file["provider"]["subnets"] == [account.subnet, account.other]
