"""Images of the cluster on AWS: the container's by digest, and the machine's (AMI)."""

from pathlib import Path
from typing import Any

import yaml
from botocore.exceptions import ClientError

from carclass import s3
from carclass.config import yaml_file
from carclass.errors import UserError

GPU_AMI = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
"""Ubuntu with Docker, NVIDIA's driver and container runtime, and Systems Manager's agent."""
ECR = ".dkr.ecr."
"""Part of the host name of every registry on ECR: account.dkr.ecr.region.amazonaws.com."""
Values = dict[str, Any]


def image_values(image: str, region: str) -> Values:
    """Return the placeholders of the image; one on ECR may be in another region or account."""
    registry, repository, _ = _split(image)
    account, registry_region = _locate(registry) if ECR in registry else ("", region)
    return {
        "IMAGE": image,
        "REGISTRY": registry,
        "REGISTRY_REGION": registry_region,
        "REPOSITORY": f"arn:aws:ecr:{registry_region}:{account}:repository/{repository}",
    }


def check_image(session: Any, image: str) -> str:
    """Return advice if ECR does not let us look for the image, "" otherwise. Raise UserError if it is not there."""
    registry, repository, digest = _split(image)
    if ECR not in registry:
        return ""
    account, region = _locate(registry)
    ecr = session.client("ecr", region_name=region)
    try:
        ecr.describe_images(registryId=account, repositoryName=repository, imageIds=[{"imageDigest": digest}])
    except ecr.exceptions.RepositoryNotFoundException as error:
        raise UserError(
            f"--image: {registry} has no repository {repository}. Create it and push the image, or correct the name."
        ) from error
    except ecr.exceptions.ImageNotFoundException as error:
        raise UserError(
            f"--image: {registry}/{repository} has no image {digest}. Give the digest that `docker push` printed."
        ) from error
    except ClientError as error:
        return f"--image could not be checked ({s3.describe(error)})."
    return ""


def _split(image: str) -> tuple[str, str, str]:
    """Return the registry, the repository and the digest of an image."""
    name, _, digest = image.partition("@")
    registry, _, repository = name.partition("/")
    return registry, repository.partition(":")[0], digest


def _locate(registry: str) -> tuple[str, str]:
    """Return the account and the region of a registry on ECR."""
    account, _, rest = registry.partition(ECR)
    return account, rest.partition(".")[0]


def find_ami(session: Any, given: str | None, file: Path) -> tuple[str, str]:
    """Return the id of the machine image, and a note if it is the former one ("" otherwise).

    given: an id or a parameter of Systems Manager. Without it, the image of an existing cluster file of this region
    stays, because `ray up` terminates a running head whose image differs from the file's.
    """
    if given is None and (former := _former_ami(file, session.region_name)):
        return former, (
            f"the machine image stays {former}, that of {file}, so that `ray up` keeps a running head. "
            f"To replace it by the latest one: --ami {GPU_AMI}"
        )
    name = given or GPU_AMI
    if name.startswith("ami-"):
        session.client("ec2").describe_images(ImageIds=[name])  # fails if there is none
        return name, ""
    ssm = session.client("ssm")
    try:
        return str(ssm.get_parameter(Name=name)["Parameter"]["Value"]), ""
    except ssm.exceptions.ParameterNotFound as error:
        raise UserError(
            f"--ami {name}: Systems Manager has no such parameter in {session.region_name}. Give ami-…, or correct "
            "the name or --region."
        ) from error


def _former_ami(file: Path, region: str) -> str:
    """Return the machine image of a cluster file's head, "" if there is no file of this region."""
    if not is_of_region(file, region):
        return ""
    return str(_read(file)["available_node_types"]["head"]["node_config"]["ImageId"])


def is_of_region(file: Path, region: str) -> bool:
    """Return True for an existing cluster file of a region."""
    return file.exists() and bool(_read(file)["provider"]["region"] == region)


def _read(file: Path) -> Values:
    """Return the content of a cluster file. Raise UserError if it is not one."""
    values = yaml_file.parse(file.read_text(), str(file), plain=yaml.safe_load)
    try:
        _ = values["provider"]["region"], values["available_node_types"]["head"]["node_config"]["ImageId"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is no cluster file of prepare_aws.py. Delete it, and run this again.") from error
    return dict(values)
