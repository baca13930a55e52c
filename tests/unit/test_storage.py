"""Storage on the local disk; tests/s3 has the same functions on S3."""

import itertools
import os
import threading
from pathlib import Path

import pytest

from carclass import storage
from carclass.errors import UserError


def test_a_written_file_is_read_back(tmp_path: Path):
    uri = storage.join(str(tmp_path), "a", "b.bin")
    storage.write_bytes(uri, b"content")
    assert storage.read_bytes(uri) == b"content"


def test_writing_replaces_an_existing_file(tmp_path: Path):
    uri = str(tmp_path / "a")
    storage.write_bytes(uri, b"a long first content")
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"


def test_writing_leaves_no_other_file_behind(tmp_path: Path):
    storage.write_bytes(str(tmp_path / "a"), b"1")
    assert os.listdir(tmp_path) == ["a"]


def test_a_reader_never_sees_a_partial_file(tmp_path: Path):
    uri, contents, seen = str(tmp_path / "a"), (b"0" * 1_000_000, b"1" * 1_000_000), set()
    storage.write_bytes(uri, contents[0])
    done = threading.Event()

    def write() -> None:
        for i in range(40):
            storage.write_bytes(uri, contents[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        seen.add(storage.read_bytes(uri))
    writer.join()
    assert seen <= set(contents)


def test_a_missing_file_raises_file_not_found(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(str(tmp_path / "nothing"))


def test_exists_is_true_for_files_only(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    existing = [storage.exists(str(tmp_path / name)) for name in ("file", "folder", "nothing")]
    assert existing == [True, False, False]


def test_a_listing_has_all_files_sorted_and_relative(tmp_path: Path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "ä ö#?.txt"):
        storage.write_bytes(str(tmp_path / name), b"")
    (tmp_path / "empty").mkdir()
    assert storage.list_files(str(tmp_path)) == ["a/b/c.txt", "a/z.txt", "b.txt", "ä ö#?.txt"]


@pytest.mark.parametrize("form", ["{}", "{}/", "file://{}", "file://{}/"])
def test_a_uri_may_have_a_scheme_and_a_trailing_slash(tmp_path: Path, form: str):
    storage.write_bytes(str(tmp_path / "a/b.txt"), b"")
    assert storage.list_files(form.format(tmp_path)) == ["a/b.txt"]


def test_a_missing_folder_has_no_files(tmp_path: Path):
    assert storage.list_files(str(tmp_path / "nothing")) == []


def test_a_file_cannot_be_listed(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be listed"):
        storage.list_files(str(tmp_path / "file"))


def test_other_schemes_are_refused():
    with pytest.raises(UserError, match=r"gs://bucket/a: gs:// is not supported. Give a local folder or an s3://"):
        storage.read_bytes("gs://bucket/a")


def test_many_files_are_read_in_order_with_failures_in_place(tmp_path: Path):
    for i in range(50):
        storage.write_bytes(str(tmp_path / str(i)), str(i).encode())
    contents = list(storage.read_many(str(tmp_path / str(i)) for i in [*range(49, -1, -1), 999, 7]))
    assert contents[:50] == [str(i).encode() for i in range(49, -1, -1)]
    assert isinstance(contents[50], FileNotFoundError)
    assert contents[51] == b"7"


def test_parallel_work_has_a_bounded_prefetch():
    started: list[int] = []
    results = storage.in_parallel(lambda number: started.append(number) or 2 * number, itertools.count())
    assert list(itertools.islice(results, 10)) == list(range(0, 20, 2))
    results.close()  # type: ignore[attr-defined]
    assert len(started) <= 10 + 2 * storage.READ_THREADS


def test_the_prefetch_of_large_files_is_bounded_by_their_bytes():
    started: list[int] = []
    sizes = itertools.repeat(storage.PREFETCH_BYTES // 3)
    results = storage.in_parallel(lambda number: started.append(number) or number, itertools.count(), sizes)
    assert list(itertools.islice(results, 10)) == list(range(10))
    results.close()  # type: ignore[attr-defined]
    assert len(started) <= 10 + 3


def test_a_file_larger_than_the_prefetch_is_read_alone():
    sizes = [1, 2 * storage.PREFETCH_BYTES, 1]
    assert list(storage.in_parallel(lambda number: 2 * number, range(3), sizes)) == [0, 2, 4]


def test_a_stream_does_not_decompress(tmp_path: Path):
    path = tmp_path / "photos.gz"  # a name that pyarrow would decompress by itself
    path.write_bytes(b"\x1f\x8b not gzip")
    with storage.open_stream(str(path)) as stream:
        assert stream.read() == b"\x1f\x8b not gzip"


def test_join_does_not_double_a_slash():
    assert storage.join("s3://bucket/a/", "b", "c.txt") == "s3://bucket/a/b/c.txt"
