"""prepare_aws.py beside an existing cluster: other regions and prefixes, machine image, operators and removal."""

import shutil
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
import yaml

from tests.helpers.aws import AMI, IMAGE, Account, give_default_route, make_account

USERS = [f"arn:aws:iam::123456789012:user/{name}" for name in ("a", "b")]


@pytest.fixture(scope="module")
def account(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    with make_account(tmp_path_factory.mktemp("home")) as account:
        boto3.client("s3").put_object(Bucket="my-bucket", Key="others/1.jpg", Body=b"photo")
        account.prepare("--budget", "5", "--email", "a@b.example").check_returncode()
        yield account


@pytest.fixture(scope="module")
def elsewhere(account: Account) -> str:
    """Return a private subnet of another region."""
    ec2 = boto3.client("ec2", region_name="us-west-2")
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    made = ec2.create_subnet(VpcId=vpc, CidrBlock="10.9.0.0/24", AvailabilityZone="us-west-2a")
    subnet = made["Subnet"]["SubnetId"]
    nat = ec2.create_nat_gateway(SubnetId=subnet, AllocationId=ec2.allocate_address(Domain="vpc")["AllocationId"])
    give_default_route(vpc, "us-west-2", NatGatewayId=nat["NatGateway"]["NatGatewayId"])
    return subnet


def state(account: Account) -> list[Any]:
    """Return all that was created, policies and files included."""
    iam = boto3.client("iam")
    policies = [
        iam.get_role_policy(RoleName=f"carclass-{role}", PolicyName=role)["PolicyDocument"]
        for role in ("worker", "head", "operator")
    ]
    files = ("build/aws.yaml", ".ssh/carclass.pem", ".ray/carclass/auth_token")
    return [account.created(), account.created("us-west-2"), policies, *((account.home / f).read_text() for f in files)]


def refuse(account: Account, *texts: str, options: tuple[str, ...], subnet: str = "") -> None:
    """Assert that prepare_aws.py refuses options with texts, and changes nothing."""
    before = state(account)
    done = account.prepare(*options, subnet=subnet)
    assert (done.returncode, [text for text in texts if text not in done.stderr]) == (2, []), done.stderr
    assert state(account) == before


@pytest.mark.parametrize("options", [(), ("--replace",), ("--remove",)])
def test_a_cluster_of_another_region_is_left_alone(account: Account, elsewhere: str, options: tuple[str, ...]):
    texts = ("was prepared in us-east-1", "prepare_aws.py --region us-east-1 --remove")
    refuse(account, *texts, options=("--region", "us-west-2", *options), subnet=elsewhere)


def test_other_prefixes_are_refused_by_their_names(account: Account):
    refuse(
        account,
        "--photos s3://my-bucket/photos (now s3://my-bucket/others)",
        "--root s3://my-bucket/team/carclass (now s3://my-bucket/team/b)",
        options=("--photos", "s3://my-bucket/others", "--root", "s3://my-bucket/team/b"),
    )


@pytest.mark.slow
def test_other_prefixes_are_taken_with_replace(account: Account):
    try:
        account.prepare("--photos", "s3://my-bucket/others", "--replace").check_returncode()
        policy = boto3.client("iam").get_role_policy(RoleName="carclass-worker", PolicyName="worker")["PolicyDocument"]
        assert "arn:aws:s3:::my-bucket/others/*" in str(policy)
    finally:
        account.prepare("--replace").check_returncode()


def machine_images(account: Account) -> set[str]:
    types = yaml.safe_load((account.home / "build" / "aws.yaml").read_text())["available_node_types"]
    return {each["node_config"]["ImageId"] for each in types.values()}


def test_the_machine_image_stays_that_of_the_cluster_file(account: Account):
    (before,) = machine_images(account)
    file = account.home / "build" / "aws.yaml"
    file.write_text(file.read_text().replace(before, "ami-00000000000000001"))
    options = ("--region", "us-east-1", "--photos", "s3://my-bucket/photos", "--root", "s3://my-bucket/team/carclass")
    done = account.run(*options, "--image", IMAGE, "--subnet", account.subnet)
    assert done.returncode == 0, done.stderr
    assert machine_images(account) == {"ami-00000000000000001"}
    assert "the machine image stays ami-00000000000000001" in done.stdout
    done = account.run(*options, "--image", IMAGE, "--subnet", account.subnet, "--ami", AMI)
    assert (machine_images(account), "stays" in done.stdout) == ({before}, False)


def trusted() -> list[str]:
    role = boto3.client("iam").get_role(RoleName="carclass-operator")["Role"]
    return [each["Principal"]["AWS"] for each in role["AssumeRolePolicyDocument"]["Statement"]]


@pytest.mark.slow
def test_operators_stay_until_others_are_given(account: Account):
    (caller,) = trusted()
    try:
        account.prepare("--operator", USERS[0], "--operator", USERS[1]).check_returncode()
        done = account.prepare()
        assert (trusted(), f"  {USERS[1]}" in done.stdout) == (USERS, True), done.stderr
        account.prepare("--operator", USERS[1]).check_returncode()
        assert trusted() == USERS[1:]
    finally:
        boto3.client("iam").delete_role_policy(RoleName="carclass-operator", PolicyName="operator")
        boto3.client("iam").delete_role(RoleName="carclass-operator")
        account.prepare().check_returncode()
    assert trusted() == [caller]


@pytest.mark.slow
def test_removal_lists_what_it_deletes_and_what_is_left(account: Account):
    home = account.home
    try:
        done = account.run("--region", "us-east-1", "--remove")
        assert (done.returncode, account.created(), (home / "build" / "aws.yaml").exists()) == (0, [], False), (
            done.stderr
        )
        names = ["security group sg-", "SSH key carclass", ".ssh/carclass.pem", "budget carclass", "build/aws.yaml"]
        names += [f"role carclass-{kind}" for kind in ("worker", "head", "operator")]
        deleted, left = done.stdout.splitlines()
        assert [name for name in names if name not in deleted] == []
        assert f"{home}/.ray/carclass" in left
        assert (home / ".ray" / "carclass" / "auth_token").exists()
        account.recorder.denied = "DeleteBudget"  # of a caller without rights of billing
        again = account.run("--region", "us-east-1", "--remove").stdout
        assert "nothing was there" in again
        assert "a budget carclass if there is one (no permission to delete it)" in again
    finally:
        account.recorder.denied = None
        account.prepare("--budget", "5", "--email", "a@b.example").check_returncode()


@pytest.mark.slow
def test_a_key_file_without_its_key_on_ec2_stays(account: Account):
    """It may be that of a cluster in another account."""
    try:
        boto3.client("ec2").delete_key_pair(KeyName="carclass")
        done = account.run("--region", "us-east-1", "--remove")
        assert (done.returncode, f"{account.home}/.ssh/carclass.pem" in done.stdout.splitlines()[1]) == (0, True)
        assert (account.home / ".ssh" / "carclass.pem").exists()
    finally:
        (account.home / ".ssh" / "carclass.pem").unlink(missing_ok=True)
        shutil.rmtree(account.home / "build", ignore_errors=True)
        account.prepare().check_returncode()
