"""Buckets and prefixes of the cluster on S3: their placeholders, and checks before anything is created."""

from collections.abc import Iterator
from typing import Any

from aws_errors import is_denied
from botocore.exceptions import ClientError

from carclass.errors import UserError

Values = dict[str, Any]


def storage_values(photos: str, root: str) -> Values:
    """Return the placeholders for S3 buckets and prefixes. Raise UserError for anything but s3://bucket/prefix."""
    values: Values = {}
    for name, uri in (("PHOTOS", photos), ("ROOT", root)):
        bucket, prefix = _split_uri(uri)
        if not uri.startswith("s3://") or not prefix:
            raise UserError(f"{uri}: give s3://bucket/prefix, so that nodes cannot access the rest of the bucket.")
        values |= {f"{name}_BUCKET": bucket, name: f"{prefix}/*"}
    folders = values["ROOT"].split("/")[:-1]  # Arrow writes an empty object for each of them
    paths = ["/".join(folders[: n + 1]) for n in range(len(folders))]
    return values | {"ROOT_FOLDERS": [f"arn:aws:s3:::{values['ROOT_BUCKET']}/{path}/" for path in paths]}


def check_buckets(session: Any, buckets: set[str]) -> tuple[list[str], list[str]]:
    """Return the customer's KMS keys of the buckets, and advice. Raise UserError for a bucket that does not exist."""
    s3, keys, advice = session.client("s3"), set(), []
    own = _own_buckets(s3)
    for bucket in sorted(buckets):
        try:
            region = s3.get_bucket_location(Bucket=bucket)["LocationConstraint"] or "us-east-1"
            keys |= set(_bucket_keys(session, bucket))
        except ClientError as error:
            if error.response["Error"]["Code"] == "NoSuchBucket":
                raise UserError(f"s3://{bucket} does not exist. Create it, or correct --photos or --root.") from error
            advice.append(f"s3://{bucket} could not be checked ({error}).")
            continue
        if region != session.region_name:
            advice.append(
                f"s3://{bucket} is in {region}: transfer between regions costs 0.02 dollars per GB, and time."
            )
        if own is not None and bucket not in own:
            advice.append(
                f"s3://{bucket} is another account's: its policy must allow the cluster's head and worker roles."
            )
    return sorted(keys), advice


def check_photos(session: Any, photos: str) -> str:
    """Return advice if the photos may not be listed, "" otherwise. Raise UserError for a prefix without objects."""
    bucket, prefix = _split_uri(photos)
    try:
        found = session.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/", MaxKeys=1)
    except ClientError as error:
        if is_denied(error):
            return f"--photos {photos} could not be checked ({error})."
        raise
    if not found.get("Contents"):
        raise UserError(f"--photos {photos}: no object has this prefix. Correct it, or upload the photos first.")
    return ""


def _split_uri(uri: str) -> tuple[str, str]:
    """Return the bucket and the prefix of s3://bucket/prefix."""
    bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
    return bucket, prefix


def _own_buckets(s3: Any) -> set[str] | None:
    """Return the names of the account's buckets, None if they may not be listed."""
    try:
        return {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
    except ClientError as error:
        if is_denied(error):  # they only serve advice
            return None
        raise


def _bucket_keys(session: Any, bucket: str) -> Iterator[str]:
    """Yield the ARNs of the customer's KMS keys with which a bucket encrypts by default."""
    try:
        encryption = session.client("s3").get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]
    except ClientError as error:
        if error.response["Error"]["Code"] == "ServerSideEncryptionConfigurationNotFoundError":
            return
        raise
    for rule in encryption["Rules"]:
        if key := rule.get("ApplyServerSideEncryptionByDefault", {}).get("KMSMasterKeyID"):
            described = session.client("kms").describe_key(KeyId=key)["KeyMetadata"]
            if described["KeyManager"] == "CUSTOMER":  # AWS' own keys allow everyone who may use the bucket
                yield described["Arn"]
