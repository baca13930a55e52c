"""S3 client of all jobs: one resolution of credentials, region and endpoint, and one retry policy.

Everything is resolved as the AWS command line does it: environment, profiles of `~/.aws/config` (with SSO, roles and
endpoints), container and instance roles. `AWS_NO_SIGN_REQUEST=true` reads public buckets without credentials, and
`AWS_REQUEST_PAYER=requester` accepts the costs of a requester-pays bucket.
"""

import os
import random
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import boto3
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

NUM_ATTEMPTS = 8
FIRST_PAUSE = 0.3
"""Seconds; the limit of the pause doubles with every attempt, so that all of them together outlast half a minute."""
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
BODY_ERRORS = (IncompleteReadError, HTTPClientError, FlexibleChecksumError, HTTPError, ConnectionError, TimeoutError)
"""Errors of a response whose body ends early, stalls or is damaged."""
ERRORS = (ClientError, BotoCoreError, ResponseParserError, *BODY_ERRORS)
"""Errors of a request that failed for good."""
TRANSIENT_ERRORS = (*BODY_ERRORS, CredentialRetrievalError, MetadataRetrievalError, ResponseParserError)
_LOCK = threading.Lock()


def client() -> Any:
    """Return the client of this process, which all threads share and which repeats requests that fail transiently."""
    with _LOCK:  # boto3's sessions are not thread-safe, its clients are
        return _create_client()


def reset() -> None:
    """Forget the client: the next one has the credentials and endpoint of the present environment."""
    with _LOCK:
        _create_client.cache_clear()


@lru_cache(maxsize=1)
def _create_client() -> Any:
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
    if os.environ.get("AWS_REQUEST_PAYER"):
        created.meta.events.register("before-call.s3", _accept_costs)
    return created


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def _is_aws(endpoint: str) -> bool:
    host = endpoint.split("://")[-1].split("/")[0].split(":")[0]
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _accept_costs(params: dict[str, Any], **_: Any) -> None:
    params["headers"]["x-amz-request-payer"] = os.environ["AWS_REQUEST_PAYER"]


def retry_delay(
    response: tuple[Any, dict[str, Any]] | None, caught_exception: Exception | None, attempts: int, **_: Any
) -> float | None:
    """Return the seconds after which botocore repeats a request, or None if it must not."""
    if attempts >= NUM_ATTEMPTS:
        return None
    if response is None:
        return pause(attempts) if isinstance(caught_exception, TRANSIENT_ERRORS) else None
    status, code = response[0].status_code, response[1].get("Error", {}).get("Code")
    return pause(attempts) if status in TRANSIENT_STATUS or code in TRANSIENT_CODES else None


def pause(attempts: int) -> float:
    """Return the seconds to wait after a number of attempts, random so that workers do not retry in step."""
    return random.uniform(0.5, 1) * FIRST_PAUSE * 2 ** (attempts - 1)  # noqa: S311 - spreads the load, decides nothing


def read_body(open_body: Callable[[], Any]) -> bytes:
    """Return the content of a response, requested again while its body ends early, stalls or is damaged."""
    for attempts in range(1, NUM_ATTEMPTS):
        body = open_body()
        try:
            return bytes(body.read())
        except BODY_ERRORS:
            time.sleep(pause(attempts))
    return bytes(open_body().read())


def error_code(error: Exception) -> tuple[int | None, str]:
    """Return the HTTP status, if any, and S3's code of an error: a response without a body has the status as code."""
    if not isinstance(error, ClientError):
        return None, type(error).__name__
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode"), error.response["Error"].get("Code", "")
