"""Storage in front of a misbehaving S3: retried and read right, or one paragraph with the cause and the remedy."""

import io
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from boto3.s3.transfer import TransferConfig

from carclass import s3 as s3_client
from carclass import storage
from carclass.ingestion import listing
from carclass.progress import Throttle
from tests.helpers.faulty_s3 import CUT, FLIPPED, PAGE, RESET, STALL, TRUNCATED, Fault, Proxy

CONTENT = bytes(range(250)) * 40
TRANSIENT = [429, 500, 502, 503, 504, RESET, STALL, TRUNCATED]
ODD_KEYS = ["a//b.jpg", "/leading.jpg", "./dot.jpg", "../up.jpg", "a/./b.jpg", "a/../b.jpg", "ä #?%2F&+.jpg", "a b.jpg"]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Shorten pauses and timeouts, and drop the client of a test's own environment."""
    monkeypatch.setattr(s3_client, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(s3_client, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(s3_client, "RETRY_LINES", Throttle(5.0, immediate=True))
    s3_client.reset()
    yield
    s3_client.reset()


@pytest.fixture
def uri(s3: Any, bucket: str) -> str:
    s3.put_object(Bucket=bucket, Key="a/b.bin", Body=CONTENT)
    return f"s3://{bucket}/a/b.bin"


def read_ranges(uri: str) -> bytes:
    with storage.open_file(uri) as file:
        return file.read(1000) + file.read()


@pytest.mark.parametrize("has_body", [True, False], ids=["body", "no body"])
@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_transient_fault_of_a_read_is_retried(uri: str, proxy: Proxy, kind: int | str, has_body: bool):
    proxy.faults = [Fault(kind, "b.bin", first=2, has_body=has_body)]
    assert storage.read_bytes(uri) == read_ranges(uri) == CONTENT
    assert storage.exists(uri)
    assert proxy.refused >= 4


@pytest.mark.parametrize("kind", [CUT, FLIPPED, PAGE])
def test_wrong_content_that_looks_right_is_read_again(uri: str, proxy: Proxy, kind: str):
    assert storage.read_bytes(uri) == CONTENT
    proxy.faults = [Fault(kind, "GET .*b.bin", first=2)]
    assert storage.read_bytes(uri) == CONTENT
    assert proxy.refused == 2


@pytest.mark.parametrize("method", ["HEAD", "PUT"])
def test_a_page_of_a_gateway_in_place_of_an_answer_is_requested_again(uri: str, proxy: Proxy, method: str):
    proxy.faults = [Fault(PAGE, f"{method} .*b.bin", first=2)]
    storage.write_bytes(uri, CONTENT[::-1])
    assert storage.stat(uri).size == len(CONTENT)
    assert storage.read_bytes(uri) == CONTENT[::-1]
    assert proxy.refused == 2


@pytest.mark.parametrize("kind", [CUT, FLIPPED, PAGE])
def test_content_that_stays_wrong_is_the_storages_fault(uri: str, proxy: Proxy, kind: str):
    assert storage.read_bytes(uri) == CONTENT
    proxy.faults = [Fault(kind, "GET .*b.bin")]
    with pytest.raises(storage.StorageError, match=r"b\.bin cannot be read .*(MD5|no ETag)"):
        storage.read_bytes(uri)


def test_etags_that_are_no_md5_are_accepted_for_content_read_twice(monkeypatch: pytest.MonkeyPatch, uri: str):
    monkeypatch.setattr(s3_client, "_md5_servers", set())
    response = {"ETag": f'"{"0" * 32}"'}
    contents = iter([b"wrong", CONTENT, CONTENT])
    assert s3_client.read_body(lambda: {**response, "Body": io.BytesIO(next(contents))}) == CONTENT


def test_etags_of_encrypted_objects_are_not_compared(uri: str):
    response = {"ETag": f'"{"0" * 32}"', "ServerSideEncryption": "aws:kms", "Body": io.BytesIO(CONTENT)}
    assert s3_client.read_body(lambda: response) == CONTENT


@pytest.mark.parametrize("kind", [429, 500, 502, 503, 504, RESET, STALL])
def test_a_transient_fault_of_a_write_listing_or_deletion_is_retried(uri: str, proxy: Proxy, kind: int | str):
    proxy.faults = [Fault(kind, first=2)]
    storage.write_bytes(f"{uri}.copy", CONTENT)
    assert storage.list_files(uri.removesuffix("/b.bin")) == ["b.bin", "b.bin.copy"]
    assert [file.key for page in listing.list_pages(uri.removesuffix("/b.bin")) for file in page] == [
        "b.bin",
        "b.bin.copy",
    ]
    storage.delete(f"{uri}.copy")
    assert storage.list_files(uri.removesuffix("/b.bin")) == ["b.bin"]


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_lasting_fault_is_the_storages_and_not_the_files(uri: str, proxy: Proxy, kind: int | str):
    proxy.faults = [Fault(kind, "b.bin")]
    with pytest.raises(storage.StorageError, match=r"b\.bin cannot be read \(.+\)\. It failed 8 times") as caught:
        storage.read_bytes(uri)
    assert proxy.refused == s3_client.NUM_ATTEMPTS
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault(503, "b.bin"), r"b\.bin: attempt 2 of 8 failed \(SlowDown 503: refused by the test\); retrying"),
        (Fault(503, "b.bin", has_body=False), r"b\.bin: attempt 2 of 8 failed \(503.*\); retrying for"),
        (Fault(RESET, "b.bin"), r"b\.bin: attempt 2 of 8 failed \(Connection was closed .*\); retrying for"),
        (Fault(STALL, "b.bin"), r"b\.bin: attempt 1 of 8 failed \(Read timeout on endpoint URL\); retrying for"),
        (Fault(TRUNCATED, "GET .*b.bin"), r"the content of an object: attempt 2 of 8 failed \(.+\); retrying for"),
    ],
)  # fmt: skip
def test_a_request_that_is_retried_for_long_is_logged_once_in_a_while(
    uri: str, proxy: Proxy, fault: Fault, text: str, caplog: pytest.LogCaptureFixture
):
    proxy.faults = [replace(fault, first=5)]
    assert storage.read_bytes(uri) == CONTENT
    (line,) = [record.message for record in caplog.records if record.name == "carclass.s3"]
    assert re.search(text, line)


def test_a_request_that_succeeds_at_the_second_attempt_is_not_logged(
    uri: str, proxy: Proxy, caplog: pytest.LogCaptureFixture
):
    proxy.faults = [Fault(503, "b.bin", first=1)]
    assert storage.read_bytes(uri) == CONTENT
    assert "attempt" not in caplog.text


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(301), r"\(PermanentRedirect 301: .*\)\. The bucket is in another region"),
        (Fault(403), r"\(AccessDenied 403: .*\)\. The credentials lack a permission"),
        (Fault(400), r"\(ExpiredToken 400: .*\)\. Renew the credentials"),
        (Fault(403, code="SignatureDoesNotMatch"), "Correct the access key"),
        (Fault(403, code="RequestTimeTooSkewed"), "Set the clock"),
        (Fault(404, code="NoSuchBucket"), "Correct the bucket's name"),
        (Fault(418, code="Teapot"), r"\(Teapot 418"),
    ],
    ids=["301", "403", "expired", "signature", "clock", "bucket", "unknown"],
)
def test_a_refused_read_names_cause_and_remedy_at_once(uri: str, proxy: Proxy, fault: Fault, message: str):
    proxy.faults = [fault]
    with pytest.raises(storage.StorageError, match=message):
        list(storage.read_many([uri]))
    assert proxy.count("b.bin") <= 2


@pytest.mark.parametrize("status", [301, 400, 403])
def test_a_refusal_without_a_body_is_known_by_its_status(uri: str, proxy: Proxy, status: int):
    proxy.faults = [Fault(status, has_body=False)]
    with pytest.raises(storage.StorageError, match=rf"cannot be read \({status}"):
        storage.exists(uri)
    with pytest.raises(storage.StorageError, match="cannot be read"):
        storage.read_bytes(uri)


def test_a_bucket_in_another_region_is_named(uri: str, proxy: Proxy):
    proxy.faults = [Fault(301, headers={"x-amz-bucket-region": "eu-west-1"})]
    with pytest.raises(storage.StorageError, match="The bucket is in region eu-west-1: set AWS_REGION=eu-west-1"):
        storage.read_bytes(uri)


def test_a_refused_connection_is_reported_with_a_remedy(s3: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3_client.reset()
    with pytest.raises(storage.StorageError, match=r"EndpointConnectionError.* check the network and AWS_ENDPOINT_URL"):
        storage.read_bytes("s3://bucket/a")


def test_the_pauses_outlast_half_a_minute(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(s3_client, "FIRST_PAUSE", 0.3)
    pauses = [s3_client.pause(attempts) for attempts in range(1, s3_client.NUM_ATTEMPTS)]
    assert sum(pauses) > 19
    assert pauses[-1] > 4 * pauses[0]


def test_only_missing_and_archived_objects_are_failures_of_one_file(s3: Any, uri: str, bucket: str):
    s3.put_object(Bucket=bucket, Key="frozen", Body=b"x", StorageClass="GLACIER")
    uris = [uri, f"s3://{bucket}/missing", f"s3://{bucket}/frozen", uri]
    first, missing, frozen, last = storage.read_many(uris)
    assert (first, last) == (CONTENT, CONTENT)
    assert isinstance(missing, FileNotFoundError)
    assert isinstance(frozen, storage.ArchivedObjectError)


def test_a_storage_error_survives_pickling(uri: str, proxy: Proxy):
    proxy.faults = [Fault(403)]
    with pytest.raises(storage.StorageError) as caught:
        storage.read_bytes(uri)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("key", ODD_KEYS)
def test_any_key_is_listed_and_read(s3: Any, bucket: str, key: str):
    s3.put_object(Bucket=bucket, Key=f"p/{key}", Body=CONTENT)
    assert storage.list_files(f"s3://{bucket}/p") == [key]
    assert storage.read_bytes(storage.join(f"s3://{bucket}/p", key)) == CONTENT


def test_a_key_with_a_leading_slash_is_read_from_the_bucket_itself(s3: Any, bucket: str):
    s3.put_object(Bucket=bucket, Key="/a.jpg", Body=CONTENT)
    assert storage.list_files(f"s3://{bucket}") == ["/a.jpg"]
    assert storage.read_bytes(storage.join(f"s3://{bucket}", "/a.jpg")) == CONTENT


def test_an_object_replaced_while_it_is_read_is_not_mixed(s3: Any, uri: str, bucket: str):
    with storage.open_file(uri) as file:
        file.read(1000)
        s3.put_object(Bucket=bucket, Key="a/b.bin", Body=CONTENT[::-1])
        with pytest.raises(storage.StorageError, match="replaced while it was read"):
            file.read(1000)


@pytest.mark.slow
def test_a_large_object_is_uploaded_from_its_pieces(bucket: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(s3_client.UPLOAD, "multipart_threshold", 2**20)
    monkeypatch.setattr(s3_client.UPLOAD, "multipart_chunksize", 5 * 2**20)
    pieces = [bytes([i]) * (700_000 + i) for i in range(12)]
    storage.write_bytes(f"s3://{bucket}/large", *pieces[:6], b"", memoryview(pieces[6]), *pieces[7:])
    assert storage.read_bytes(f"s3://{bucket}/large") == b"".join(pieces)


# Client


def test_region_and_endpoint_of_a_profile_are_used(s3: Any, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    endpoint = s3.meta.endpoint_url
    (tmp_path / "config").write_text(
        f"[profile cars]\nregion = eu-west-3\nendpoint_url = {endpoint}\n"
        "aws_access_key_id = a\naws_secret_access_key = b\n"
    )
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "cars")
    s3_client.reset()
    assert s3_client.client().meta.region_name == "eu-west-3"
    assert storage.read_bytes(uri) == CONTENT


def test_the_region_may_be_given_as_other_sdks_take_it(s3: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    s3_client.reset()
    assert s3_client.client().meta.region_name == "eu-north-1"


@pytest.mark.parametrize(("name", "kind"), [("report.html", "text/html; charset=utf-8"), ("a.bin", None)])
@pytest.mark.parametrize("threshold", [1, 2**20])
def test_a_page_is_stored_as_one_so_that_browsers_show_it(
    s3: Any, uri: str, bucket: str, monkeypatch: pytest.MonkeyPatch, name: str, kind: str | None, threshold: int
):
    monkeypatch.setattr(s3_client, "UPLOAD", TransferConfig(multipart_threshold=threshold))
    storage.write_bytes(f"s3://{bucket}/pages/{name}", b"<html>")
    stored = s3.head_object(Bucket=bucket, Key=f"pages/{name}")["ContentType"]
    assert (stored == kind) if kind else not stored.startswith("text/html")


def test_a_public_bucket_is_read_without_credentials(s3: Any, uri: str, bucket: str, monkeypatch: pytest.MonkeyPatch):
    s3.put_object_acl(Bucket=bucket, Key="a/b.bin", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    s3_client.reset()
    with pytest.raises(storage.StorageError, match="AWS_NO_SIGN_REQUEST=true for a public bucket"):
        storage.read_bytes(uri)
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "true")
    s3_client.reset()
    assert storage.read_bytes(uri) == CONTENT


@pytest.mark.slow
def test_costs_of_a_requester_pays_bucket_are_accepted(uri: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    s3_client.reset()
    sent: list[str] = []
    s3_client.client().meta.events.register(
        "before-send.s3", lambda request, **_: sent.append(request.headers["x-amz-request-payer"])
    )
    assert storage.read_bytes(uri) == CONTENT
    assert sent in (["requester"], [b"requester"])


def test_an_endpoint_that_is_no_url_is_refused(s3: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    s3_client.reset()
    with pytest.raises(storage.UserError, match="Set AWS_ENDPOINT_URL to a URL such as http://host:9000"):
        storage.read_bytes("s3://bucket/a")


# Conditional writes


def test_of_two_creations_one_succeeds(bucket: str):
    uri = f"s3://{bucket}/lease"
    assert [storage.create(uri, b"first"), storage.create(uri, b"second")] == [True, False]
    assert storage.read_bytes(uri) == b"first"


def test_a_file_is_replaced_only_in_the_version_that_is_known(bucket: str):
    uri = f"s3://{bucket}/lease"
    storage.create(uri, b"first")
    version = storage.stat(uri).version
    assert [storage.replace(uri, b"second", version), storage.replace(uri, b"third", version)] == [True, False]
    assert storage.read_bytes(uri) == b"second"
    assert not storage.replace(f"{uri}.missing", b"x", version)


def test_a_store_without_conditional_writes_is_asked_before(bucket: str, proxy: Proxy):
    proxy.faults = [Fault(501, "PUT", first=1, code="NotImplemented")]
    uri = f"s3://{bucket}/lease"
    assert storage.create(uri, b"first")
    proxy.faults = [Fault(501, "PUT", first=1, code="NotImplemented")]
    assert not storage.create(uri, b"second")


def test_times_are_of_the_stores_clock(uri: str):
    stat = storage.stat(uri)
    assert stat.size == len(CONTENT)
    assert -2 <= stat.now - stat.modified < 60
