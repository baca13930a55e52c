"""S3 client of all jobs: one resolution of credentials, region and endpoint, and one retry policy.

Everything is resolved as the AWS command line does it: environment, profiles of `~/.aws/config` (with SSO, roles and
endpoints), container and instance roles. `AWS_NO_SIGN_REQUEST=true` reads public buckets without credentials, and
`AWS_REQUEST_PAYER=requester` accepts the costs of a requester-pays bucket.
"""

import hashlib
import io
import logging
import os
import random
import re
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from functools import lru_cache
from itertools import accumulate
from typing import Any

import boto3
import botocore.session
from boto3.s3.transfer import TransferConfig
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
    ReadTimeoutError,
)
from botocore.exceptions import ConnectionError as EndpointError
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from carclass.errors import UserError
from carclass.formatting import duration_text
from carclass.progress import Throttle

log = logging.getLogger(__name__)
NUM_ATTEMPTS = 8
FIRST_PAUSE = 0.3
"""Seconds; the limit of the pause doubles with every attempt. All seven together take 19 to 38 seconds."""
CONNECT_TIMEOUT, READ_TIMEOUT = 10, 60
"""Seconds without any progress, after which a request is repeated."""
MAX_CONNECTIONS = 32
METADATA_ATTEMPTS = 5
"""Requests for the credentials of an instance role, which is throttled when many workers start at once."""
TRANSIENT_STATUS = (408, 429, *(status for status in range(500, 600) if status != 501))  # 501: not implemented
TRANSIENT_CODES = {
    "BadDigest", "BandwidthLimitExceeded", "ConditionalRequestConflict", "IncompleteBody", "InternalError",
    "OperationAborted", "RequestLimitExceeded", "RequestThrottled", "RequestTimeout", "ServiceUnavailable", "SlowDown",
    "Throttling", "ThrottlingException", "TooManyRequests", "TooManyRequestsException",
}  # fmt: skip
BODY_ERRORS = (
    IncompleteReadError, EndpointError, HTTPClientError, FlexibleChecksumError, HTTPError, ConnectionError,
    TimeoutError,
)  # fmt: skip
"""Errors of a response whose body ends early, stalls or is damaged."""
ERRORS = (ClientError, BotoCoreError, ResponseParserError, *BODY_ERRORS)
"""Errors of a request that failed for good."""
TRANSIENT_ERRORS = (*BODY_ERRORS, CredentialRetrievalError, MetadataRetrievalError, ResponseParserError)
REQUIRED = {
    "ListObjectsV2": "IsTruncated", "HeadObject": "LastModified", "PutObject": "ETag", "UploadPart": "ETag",
    "CreateMultipartUpload": "UploadId", "CompleteMultipartUpload": "ETag",
}  # fmt: skip
"""Field without which a response of success is not from the storage, such as a gateway's page."""
RETRY_LINES = Throttle(5.0, immediate=True)
"""Limit of the lines on retries, for each process."""
UPLOAD = TransferConfig(multipart_threshold=64 * 2**20, multipart_chunksize=32 * 2**20)
"""Multipart uploads are for checkpoints and tables; a part of a dataset is one request."""
REMEDIES = (
    (("NoSuchBucket", "InvalidBucketName", "ParamValidationError"), "Correct the bucket's name, or create the bucket."),
    (
        ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
        "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role; set "
        "AWS_NO_SIGN_REQUEST=true for a public bucket.",
    ),
    (
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "InvalidToken", "400",
         "UnauthorizedSSOTokenError", "SSOTokenLoadError", "TokenRetrievalError"),
        "Renew the credentials (such as `aws sso login`), and run the same command again: finished work is kept.",
    ),
    (("InvalidAccessKeyId", "SignatureDoesNotMatch", "401"), "Correct the access key and its secret."),
    (("RequestTimeTooSkewed",), "Set the clock of this machine."),
    (("PreconditionFailed", "412"), "It was replaced while it was read: run the same command again."),
)  # fmt: skip
"""Remedies by S3's code or the name of botocore's error; see `remedy` for the others."""
_LOCK, _LOG_LOCK = threading.Lock(), threading.Lock()
_MD5 = re.compile("[0-9a-f]{32}")
_md5_servers: set[str] = set()
"""Endpoints of which an ETag was the MD5 of its content."""


def client() -> Any:
    """Return the client of this process, which all threads share and which repeats requests that fail transiently.

    Raise UserError if the endpoint is no URL.
    """
    try:
        with _LOCK:  # boto3's sessions are not thread-safe, its clients are
            return _create_client()
    except ValueError as error:
        raise UserError(f"no S3 client: {error}. Set AWS_ENDPOINT_URL to a URL such as http://host:9000.") from error


def reset() -> None:
    """Forget the client: the next one has the credentials and endpoint of the present environment."""
    with _LOCK:
        _create_client.cache_clear()


@lru_cache(maxsize=1)
def _create_client() -> Any:
    logging.getLogger("botocore").setLevel(logging.WARNING)  # Ray's workers log from INFO on
    core = botocore.session.get_session()
    core.set_config_variable("metadata_service_num_attempts", METADATA_ATTEMPTS)
    # boto3 ignores AWS_REGION, which all other SDKs and AWS's own services use.
    session = boto3.Session(botocore_session=core, region_name=os.environ.get("AWS_REGION") or None)
    options: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": READ_TIMEOUT,
        "max_pool_connections": MAX_CONNECTIONS,
        "retries": {"mode": "standard", "total_max_attempts": 1},  # see retry_delay
    }
    if _is_set("AWS_NO_SIGN_REQUEST"):
        options["signature_version"] = UNSIGNED
    created = session.client("s3", config=Config(**options))
    if not _is_aws(created.meta.endpoint_url):
        options["s3"] = {"addressing_style": "path", **(created.meta.config.s3 or {})}  # only AWS has a host per bucket
        options["request_checksum_calculation"] = "when_required"  # many servers reject the newer checksums
        created = session.client("s3", config=Config(**options))
    created.meta.events.register("needs-retry.s3", retry_delay)
    created.meta.events.register("before-call.s3.HeadBucket", _do_not_redirect)
    if os.environ.get("AWS_REQUEST_PAYER"):
        created.meta.events.register("before-call.s3", _accept_costs)
    return created


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _is_aws(endpoint: str) -> bool:
    host = endpoint.split("://")[-1].split("/")[0].split(":")[0]
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _do_not_redirect(context: dict[str, Any], **_: Any) -> None:
    """Mark botocore's own look-up of a bucket's region as redirected: refused too, it would look it up for ever."""
    context["s3_redirect"]["redirected"] = True


def _accept_costs(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-request-payer"] = os.environ["AWS_REQUEST_PAYER"]


def retry_delay(
    response: tuple[Any, dict[str, Any]] | None,
    caught_exception: Exception | None,
    attempts: int,
    request_dict: dict[str, Any],
    operation: Any,
    **_: Any,
) -> float | None:
    """Return the seconds after which botocore repeats a request, or None if it must not.

    Raise ResponseParserError after the last attempt if the response is not from the storage.
    """
    required = REQUIRED.get(operation.name)
    if response is not None and response[0].status_code < 300 and required is not None and required not in response[1]:
        response, caught_exception = None, ResponseParserError(f"a response without {required}, as of a gateway")
        if attempts >= NUM_ATTEMPTS:
            raise caught_exception
    if response is None:
        is_transient, cause = isinstance(caught_exception, TRANSIENT_ERRORS), str(caught_exception)
    else:
        status, error = response[0].status_code, response[1].get("Error", {})
        is_transient = status in TRANSIENT_STATUS or error.get("Code") in TRANSIENT_CODES
        cause = f"{error.get('Code', '')} {status}: {error.get('Message', '')}".strip(": ")
    if not is_transient or attempts >= NUM_ATTEMPTS:
        return None
    _log_retry(f"{request_dict['method']} {request_dict['url'].split('?')[0]}", attempts, caught_exception, cause)
    return pause(attempts)


def _log_retry(request: str, attempts: int, error: Exception | None, cause: str) -> None:
    """Log a request that failed twice, or took long to fail: a single retry is normal."""
    if attempts < 2 and not isinstance(error, ConnectTimeoutError | ReadTimeoutError):
        return
    with _LOG_LOCK:
        if not RETRY_LINES.is_ready():
            return
    left = duration_text(0.75 * sum(FIRST_PAUSE * 2 ** (number - 1) for number in range(attempts, NUM_ATTEMPTS)))
    reason = " ".join(re.sub(r':? "?https?://\S+', "", cause).split())[:200]
    text = "S3: %s: attempt %d of %d failed (%s); retrying for about %s, longer if requests time out"
    log.warning(text, request, attempts, NUM_ATTEMPTS, reason, left)


def pause(attempts: int) -> float:
    """Return the seconds to wait after a number of attempts, random so that workers do not retry in step."""
    return random.uniform(0.5, 1) * FIRST_PAUSE * 2 ** (attempts - 1)  # noqa: S311 - spreads the load, decides nothing


def read_body(get_object: Callable[[], dict[str, Any]]) -> bytes:
    """Return the content of a response, requested again while its body ends early, stalls or is damaged."""
    rejected: set[str] = set()
    for attempts in range(1, NUM_ATTEMPTS + 1):
        response = get_object()
        try:
            data = bytes(response["Body"].read())
            _check_content(response, data, rejected)
            return data
        except BODY_ERRORS as error:
            if attempts == NUM_ATTEMPTS:
                raise
            _log_retry("the content of an object", attempts, error, str(error))
            time.sleep(pause(attempts))
    raise AssertionError


def _check_content(response: dict[str, Any], data: bytes, rejected: set[str]) -> None:
    """Compare an object with its ETag, where that is the MD5. Raise FlexibleChecksumError if they differ.

    It is one on AWS for objects that were written by one request and not encrypted with a key of KMS or the customer.
    Other servers may have ETags of another kind: there, content that was read twice the same is accepted, until a first
    ETag was the MD5. rejected: MD5 of contents that were read before.
    """
    if "ETag" not in response:
        raise FlexibleChecksumError(error_msg="the response has no ETag, so it is not from the storage")
    etag = response["ETag"].strip('"')
    is_encrypted = response.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in response
    if "ContentRange" in response or is_encrypted or not _MD5.fullmatch(etag):
        return
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if digest == etag:
        _md5_servers.add(client().meta.endpoint_url)
    elif digest not in rejected or _is_aws(client().meta.endpoint_url) or client().meta.endpoint_url in _md5_servers:
        rejected.add(digest)
        raise FlexibleChecksumError(error_msg=f"the content's MD5 is {digest}, not the ETag {etag}")


def server_time(response: dict[str, Any]) -> float:
    """Return the time of a response by the server's clock, in seconds; by ours if it does not say."""
    date = response["ResponseMetadata"]["HTTPHeaders"].get("date")
    return time.time() if date is None else parsedate_to_datetime(date).timestamp()


def error_code(error: Exception) -> tuple[int | None, str]:
    """Return the HTTP status, if any, and S3's code of an error: a response without a body has the status as code."""
    if not isinstance(error, ClientError):
        return None, type(error).__name__
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode"), error.response["Error"].get("Code", "")


def describe(error: Exception) -> str:
    """Return an error in a line: S3's code and message, or the type and text of another error."""
    status, code = error_code(error)
    message = error.response["Error"].get("Message", "") if isinstance(error, ClientError) else str(error)
    number = "" if status is None or code == str(status) else f" {status}"
    return " ".join(f"{code}{number}: {message}".split()).rstrip(": .")[:400]


def remedy(error: Exception) -> str:
    """Return the advice for an error that stops a job."""
    status, code = error_code(error)
    for codes, text in REMEDIES:
        if code in codes:
            return text
    if status in (301, 307) or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        headers = error.response["ResponseMetadata"].get("HTTPHeaders", {}) if isinstance(error, ClientError) else {}
        region = headers.get("x-amz-bucket-region")
        place = f"region {region}: set AWS_REGION={region}" if region else "another region: set AWS_REGION to it"
        return f"The bucket is in {place}."
    if "Quota" in code:
        return "Free some space or raise the quota, and run the same command again: finished work is kept."
    if status == 403:
        return (
            "The credentials lack a permission (s3:GetObject, s3:ListBucket, s3:PutObject or s3:DeleteObject, and "
            "kms:Decrypt of an encrypted object), or the requester pays: then set AWS_REQUEST_PAYER=requester. Run the "
            "same command again afterwards: finished work is kept."
        )
    if status in TRANSIENT_STATUS or code in TRANSIENT_CODES or isinstance(error, TRANSIENT_ERRORS):
        return (
            f"It failed {NUM_ATTEMPTS} times: check the network and AWS_ENDPOINT_URL, and run the same command again "
            "once the storage responds: finished work is kept."
        )
    return "Correct the cause that the storage names, and run the same command again: finished work is kept."


def list_keys(uri: str) -> Iterator[str]:
    """Yield the keys below an s3:// URI, relative to it."""
    bucket, _, prefix = uri.removeprefix("s3://").rstrip("/").partition("/")
    prefix = prefix and f"{prefix}/"
    for page in client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", []):
            if not entry["Key"].endswith("/"):  # the marker of a folder
                yield entry["Key"][len(prefix) :]


def upload(address: dict[str, str], pieces: Sequence[bytes | memoryview]) -> None:
    """Write an object from one or several pieces, a page as such, for browsers. address: Bucket and Key."""
    kind = {"ContentType": "text/html; charset=utf-8"} if address["Key"].endswith(".html") else {}
    if sum(map(len, pieces)) < UPLOAD.multipart_threshold:
        client().put_object(**address, **kind, Body=b"".join(pieces))
    else:
        body = io.BufferedReader(_Pieces(pieces))
        client().upload_fileobj(body, *address.values(), ExtraArgs=kind, Config=UPLOAD)


class _Pieces(io.RawIOBase):
    """Pieces of bytes as one seekable file, without a copy."""

    def __init__(self, pieces: Sequence[bytes | memoryview]) -> None:
        self.pieces = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        self.ends = [*accumulate(map(len, self.pieces))]
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.ends[-1]}[whence]
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        i = bisect_right(self.ends, self.position)
        if i == len(self.pieces):
            return 0
        left = self.ends[i] - self.position
        data = self.pieces[i][len(self.pieces[i]) - left :][: len(buffer)]
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)
