"""docs/cluster.md on a simulated cloud: each of its shell commands is run as typed, in order.

AWS is moto; its instances are machines in network namespaces on which `ray up` and Ray's autoscaler really run the
commands of cluster/aws.yaml; the job is the real pipeline. Not real: GPUs, images, Systems Manager and AWS itself.
"""

import re
from collections.abc import Iterator

import boto3
import pytest
import yaml

from carclass import storage
from tests.helpers.clusters import wait_for
from tests.helpers.hosts import missing_requirement
from tests.helpers.rehearsal import BUCKET, ON_CPUS, Done, Rehearsal, interrupt, rehearse, to_options
from tests.helpers.runbook import Command

pytestmark = [
    pytest.mark.slow,
    pytest.mark.nightly,
    pytest.mark.timeout(3000),  # the first test waits for all of it
    pytest.mark.skipif(missing_requirement() is not None, reason=str(missing_requirement())),
]  # 260 to 360 s
NEEDS_REAL_CLOUD = {
    # The command's resource and namespace are those of cluster/kuberay.yaml, which test_kuberay.py checks by schema.
    "kubectl -n carclass delete rayjob carclass",
}
ROOT = f"s3://{BUCKET}/carclass"


@pytest.fixture(scope="module")
def rehearsal(s3, tmp_path_factory) -> Iterator[Rehearsal]:
    """Run the page from its top to its end."""
    with rehearse(tmp_path_factory.mktemp("rehearsal")) as rehearsal:
        start_cluster(rehearsal)
        run_job(rehearsal)
        tear_down(rehearsal)
        yield rehearsal


def start_cluster(rehearsal: Rehearsal) -> None:
    """Run the commands before the submission; keep the tunnel open."""
    for command in rehearsal.blocks[: rehearsal.blocks.index(rehearsal.command("submit.py"))]:
        if "ray dashboard" in command.text:
            rehearsal.open_dashboard()
        else:
            assert_success(rehearsal.run(command))


def run_job(rehearsal: Rehearsal) -> None:
    """Submit the job, leave it, follow it, stop it and let it end; run the commands of the text meanwhile."""
    job = rehearsal.submit()
    wait_for(lambda: "mask: starting" in job.log.read_text(), *job, seconds=900)
    interrupt(job)
    assert job.process.wait(timeout=60) == 130
    (stop,) = re.findall(r"`(ray job stop [^`]+)`", job.log.read_text())
    follower = rehearsal.submit()
    wait_for(lambda: "already running" in follower.log.read_text(), *follower, seconds=60)
    run_in_text(rehearsal, Command(stop))
    status = follower.process.wait(timeout=120)
    rehearsal.history.append(Done("follow", status, follower.log.read_text(), 0))
    assert_success(rehearsal.run(rehearsal.command("submit.py"), f" {to_options(ON_CPUS)}", seconds=1500))
    settings = {"root": ROOT, "ingest": {"photos": f"s3://{BUCKET}/photos"}, **ON_CPUS}
    settings["train"] = {**ON_CPUS["train"], "name": "first"}
    (rehearsal.cloud.desk / "my.yml").write_text(yaml.safe_dump(settings))
    done = {done.command.removeprefix(".venv/bin/") for done in rehearsal.history}
    for command in rehearsal.spans:
        if command.text not in done | NEEDS_REAL_CLOUD:
            run_in_text(rehearsal, command)


def run_in_text(rehearsal: Rehearsal, command: Command) -> None:
    """Run a command of the text with the block's settings in an activated virtual environment."""
    settings = rehearsal.command("submit.py").settings
    assert_success(rehearsal.run(Command(command.text, f"{settings}export PATH=$PWD/.venv/bin:$PATH\n")))


def tear_down(rehearsal: Rehearsal) -> None:
    """Close the tunnel and run the commands after the submission."""
    rehearsal.close_dashboard()
    for command in rehearsal.blocks[rehearsal.blocks.index(rehearsal.command("submit.py")) + 1 :]:
        assert_success(rehearsal.run(command))
    assert_success(rehearsal.run(rehearsal.command("prepare_aws.py"), " --remove"))


def assert_success(done: Done) -> None:
    assert done.status == 0, f"{done.command}\n{done.output[-5000:]}"


def outputs(rehearsal: Rehearsal, words: str) -> list[str]:
    """Return the outputs of the commands that contain a text."""
    return [done.output for done in rehearsal.history if words in done.command]


def test_every_command_of_the_page_is_run(rehearsal: Rehearsal) -> None:
    run = {done.command.removeprefix(".venv/bin/") for done in rehearsal.history}
    page = {command.text.removeprefix(".venv/bin/") for command in (*rehearsal.blocks, *rehearsal.spans)}
    assert page - run == NEEDS_REAL_CLOUD


def test_the_plan_counts_the_cpus_of_the_nodes_that_may_be_started(rehearsal: Rehearsal) -> None:
    plans = [" ".join(output.split()) for output in outputs(rehearsal, "submit.py")]
    assert all("128 CPUs, " in plan and "of up to 16 CPUs each" in plan for plan in plans)  # of 8 c7i.4xlarge


def test_the_job_publishes_datasets_a_trained_run_and_its_report(rehearsal: Rehearsal) -> None:
    paths = ["datasets/v1/manifest.json", "datasets/v2/manifest.json", "experiments/first/unfrozen/best.safetensors"]
    paths.append("experiments/first/report/report.html")
    assert [path for path in paths if not storage.exists(f"{ROOT}/{path}")] == []


def test_a_follower_is_told_that_the_job_was_stopped(rehearsal: Rehearsal) -> None:
    (follower,) = (done for done in rehearsal.history if done.command == "follow")
    assert follower.status != 0
    assert "STOPPED" in follower.output


def test_the_autoscaler_starts_nodes_for_the_job_and_all_are_terminated(rehearsal: Rehearsal) -> None:
    kinds = [instance.kind for instance in rehearsal.cloud.instances.values()]
    assert kinds[0] == "head"
    assert {*kinds} == {"head", "read"}, "of a run without GPUs, evaluation takes none"
    assert rehearsal.cloud.running() == []
    assert "".join(outputs(rehearsal, "aws ec2 describe-instances")).split() == ["[]"]


def test_nothing_that_the_preparation_created_is_left(rehearsal: Rehearsal) -> None:
    iam, ec2 = boto3.client("iam"), boto3.client("ec2")
    names = [role["RoleName"] for role in iam.list_roles()["Roles"]]
    names += [group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]]
    names += [key["KeyName"] for key in ec2.describe_key_pairs()["KeyPairs"]]
    assert [name for name in names if name.startswith("carclass")] == []
