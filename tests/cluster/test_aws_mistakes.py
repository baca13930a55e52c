"""Mistakes on prepare_aws.py's command line and errors of AWS: one paragraph, status 2, and nothing is created."""

from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from carclass.errors import UserError
from cluster.aws_options import parse_options
from tests.helpers.aws import IMAGE, Account, make_account
from tests.helpers.faulty_s3 import Fault

OPTIONS = {"--region": "us-east-1", "--subnet": "subnet-1", "--photos": "s3://b/p", "--root": "s3://b/r"}
DIGEST = IMAGE.partition("@")[2]


@pytest.fixture(scope="module")
def account(s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    with make_account(tmp_path_factory.mktemp("home")) as account:
        yield account


@pytest.fixture(autouse=True)
def no_faults(account: Account) -> Iterator[None]:
    yield
    account.recorder.faults, account.recorder.denied = [], None


def refuse(account: Account, text: str, *options: str, **kwargs: str) -> None:
    """Assert that prepare_aws.py refuses options in one paragraph with a text, and creates nothing."""
    done = account.prepare(*options, **kwargs)
    check_refusal(done, text)
    assert (account.created(), (account.home / "build").exists()) == ([], False)


def check_refusal(done: Any, text: str) -> None:
    assert (done.returncode, text in done.stderr, len(done.stderr.splitlines())) == (2, True, 1), done.stderr


def parse(monkeypatch: pytest.MonkeyPatch, *options: str, **given: str) -> Any:
    """Parse a complete command line with further options, or others in place of them."""
    values = {"--image": IMAGE, **OPTIONS, **{f"--{name}": value for name, value in given.items()}}
    monkeypatch.setattr("sys.argv", ["prepare_aws.py", *(word for pair in values.items() for word in pair), *options])
    return parse_options("")


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("registry.example/carclass@sha256:…", "a digest is sha256: and 64 hexadecimal digits"),
        (f"registry.example/carclass@{DIGEST[:-1]}", "a digest is sha256: and 64 hexadecimal digits"),
        (f"carclass@{DIGEST}", "names no registry"),
        (f"me/carclass@{DIGEST}", f"docker.io/me/carclass@{DIGEST[:7]}"),
        ("registry.example/carclass:1", "has no digest"),
    ],
)
def test_an_image_without_registry_or_whole_digest_is_refused(monkeypatch, image: str, text: str):
    with pytest.raises(UserError, match=text):
        parse(monkeypatch, image=image)


@pytest.mark.parametrize("registry", ["docker.io/me", "localhost:5000", "public.ecr.aws/x"])
def test_an_image_of_any_registry_is_accepted(monkeypatch, registry: str):
    assert parse(monkeypatch, image=f"{registry}/carclass@{DIGEST}").image.startswith(registry)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--budget", "-5", "--email", "a@b.example"], "--budget -5: give dollars a month, more than 0"),
        (["--budget", "0", "--email", "a@b.example"], "--budget 0: give dollars"),
        (["--budget", "inf", "--email", "a@b.example"], "--budget inf: give dollars"),
        (["--budget", "five", "--email", "a@b.example"], "invalid float value"),
        (["--budget", "5", "--email", "me"], "--email me is no address"),
        (["--budget", "5"], "--budget and --email together"),
        (["--email", "a@b.example"], "--budget and --email together"),
        (["--operator", "arn:aws:iam::12:user/me"], "is no ARN of a user or role"),
        (["--operator", "me"], "--operator me is no ARN"),
        (["--photos", "s3://b/other"], "`--photos` is given 2 times"),
        (["--rem"], "`--rem` is not an option"),
    ],
)
def test_a_malformed_repeated_or_abbreviated_option_is_refused(monkeypatch, options: list[str], text: str):
    with pytest.raises(UserError, match=text):
        parse(monkeypatch, *options)


def test_several_subnets_and_operators_are_accepted(monkeypatch):
    arns = ["arn:aws:iam::123456789012:user/team/me", "arn:aws:iam::123456789012:role/aws-reserved/sso/A_1"]
    options = parse(monkeypatch, "--subnet", "subnet-2", "--operator", arns[0], "--operator", arns[1])
    assert (options.subnet, options.operator) == (["subnet-1", "subnet-2"], arns)


def test_missing_options_are_named_unless_the_cluster_is_removed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["prepare_aws.py", "--region", "us-east-1", "--subnet", "a"])
    with pytest.raises(UserError, match="required: --photos, --root, --image"):
        parse_options("")
    monkeypatch.setattr("sys.argv", ["prepare_aws.py", "--region", "us-east-1", "--remove"])
    assert parse_options("").remove


def test_a_repository_or_digest_that_ecr_does_not_have_is_refused(account: Account):
    refuse(account, "has no repository nothing", image=IMAGE.replace("carclass", "nothing"))
    refuse(account, "has no image sha256:cdcd", image=IMAGE.replace("ab" * 32, "cd" * 32))


def test_photos_without_any_object_are_refused(account: Account):
    refuse(account, "--photos s3://my-bucket/photo: no object has this prefix", "--photos", "s3://my-bucket/photo")


@pytest.mark.slow
def test_what_may_not_be_looked_up_is_advice(account: Account):
    account.recorder.denied = "DescribeImages"
    account.recorder.faults = [Fault(403, r"^GET /\?x-id=ListBuckets"), Fault(403, "^GET /my-bucket.*list-type=2")]
    done = account.prepare()
    try:
        assert done.returncode == 0, done.stderr
        assert "advice: --image could not be checked (AccessDeniedException" in done.stdout
        assert "advice: --photos s3://my-bucket/photos could not be checked" in done.stdout
        assert "another account's" not in done.stdout
    finally:
        account.prepare("--remove").check_returncode()
        (account.home / "build").rmdir()


def test_an_unknown_subnet_is_an_error_with_a_remedy(account: Account):
    refuse(account, "Check --subnet, and --region", subnet="subnet-0123456789abcdef0")


def test_an_unknown_parameter_or_machine_image_is_an_error_with_a_remedy(account: Account):
    refuse(account, "--ami /no/such: Systems Manager has no such parameter in us-east-1", "--ami", "/no/such")
    refuse(account, "Check --ami, and --region", "--ami", "ami-0123456789abcdef0")


def test_missing_credentials_are_an_error_with_a_remedy(account: Account, monkeypatch: pytest.MonkeyPatch):
    options = ("--region", "us-east-1", "--remove")
    check_refusal(account.run(*options, AWS_PROFILE="nosuch"), "(nosuch) could not be found. Set AWS_PROFILE")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    check_refusal(account.run(*options), "Unable to locate credentials. Set AWS_PROFILE")


def test_an_endpoint_that_cannot_be_reached_is_an_error_with_a_remedy(account: Account):
    done = account.run("--region", "us-east1", "--remove", AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1")
    check_refusal(done, "Check the spelling of --region")


def test_a_missing_permission_is_an_error_with_its_name(account: Account):
    account.recorder.denied = "GetRolePolicy"
    done = account.run("--region", "us-east-1", "--remove")
    check_refusal(done, "The credentials lack the permission for GetRolePolicy")


@pytest.mark.slow
def test_a_cluster_whose_subnet_is_deleted_can_be_removed(account: Account):
    ec2 = boto3.client("ec2")
    (described,) = ec2.describe_subnets(SubnetIds=[account.subnet])["Subnets"]
    made = ec2.create_subnet(VpcId=described["VpcId"], CidrBlock="10.9.8.0/24", AvailabilityZone="us-east-1a")
    subnet = made["Subnet"]["SubnetId"]
    account.prepare(subnet=subnet).check_returncode()
    ec2.delete_subnet(SubnetId=subnet)
    account.prepare("--remove", subnet=subnet).check_returncode()
    assert account.created() == []
    (account.home / "build").rmdir()
