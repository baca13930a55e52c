"""Errors of AWS as messages for the administrator: the service's own words and a remedy."""

from collections.abc import Iterator
from contextlib import contextmanager

from botocore.exceptions import BotoCoreError, ClientError

from carclass import s3
from carclass.errors import UserError

DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation")
REMEDIES = (
    (
        ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
        "Set AWS_PROFILE to a profile of ~/.aws/config, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    ),
    (
        ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "UnauthorizedSSOTokenError", "SSOTokenLoadError",
         "TokenRetrievalError"),
        "Renew the credentials, such as by `aws sso login`, and run the same command again.",
    ),
    (
        ("AuthFailure", "InvalidAccessKeyId", "InvalidClientTokenId", "SignatureDoesNotMatch",
         "UnrecognizedClientException"),
        "Check AWS_PROFILE or the access key, and that the account has enabled the region of --region.",
    ),
    (
        ("EndpointConnectionError", "ConnectTimeoutError", "InvalidRegionError", "ProxyConnectionError", "SSLError"),
        "Check the spelling of --region, the network and AWS_ENDPOINT_URL.",
    ),
    (
        ("InvalidSubnetID.NotFound", "InvalidSubnetID.Malformed", "InvalidSubnetId.Malformed"),
        "Check --subnet, and --region, which must be the subnet's.",
    ),
    (
        ("InvalidAMIID.NotFound", "InvalidAMIID.Malformed", "InvalidAMIID.Unavailable"),
        "Check --ami, and --region, which must be the machine image's.",
    ),
    (("MalformedPolicyDocument",), "Check --operator: each user and role must exist."),
    (("DependencyViolation", "DeleteConflict"), "Remove what still uses it, and run the same command again."),
)  # fmt: skip
"""Remedies by the service's code or the name of botocore's error; see `_remedy` for the others."""


def is_denied(error: ClientError) -> bool:
    """Return True if the credentials lack the permission for a request."""
    return s3.error_code(error)[1] in (*DENIED, "403")


@contextmanager
def aws_error_report() -> Iterator[None]:
    """Raise UserError for an error of AWS, or of botocore before it asks AWS."""
    try:
        yield
    except (ClientError, BotoCoreError) as error:
        place = f"AWS {error.operation_name}" if isinstance(error, ClientError) else "AWS"
        raise UserError(f"{place}: {s3.describe(error)}. {_remedy(error)}") from error


def _remedy(error: ClientError | BotoCoreError) -> str:
    """Return the advice for an error."""
    _, code = s3.error_code(error)
    for codes, text in REMEDIES:
        if code in codes:
            return text
    if isinstance(error, ClientError) and is_denied(error):
        return (
            f"The credentials lack the permission for {error.operation_name}: set AWS_PROFILE to an administrator's "
            "profile, or add the permission."
        )
    return "Check --region, AWS_PROFILE and the other options, and run the same command again."
