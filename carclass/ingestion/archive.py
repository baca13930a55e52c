"""Photos in a .tgz or .tar archive, which can only be read sequentially and so by one process."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from carclass import storage
from carclass.data.inventory import INPUT, Listed
from carclass.errors import UserError

SUFFIXES = (".tgz", ".tar.gz", ".tar")
LOADED = pa.schema([*INPUT, ("data", pa.large_binary()), ("error", pa.string())])
"""A photo's bytes, or the storage error that replaces them."""


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    archive: tarfile.TarFile
    info: tarfile.TarInfo

    def read(self) -> bytes:
        """Return the content, before the archive advances to the next member."""
        file = self.archive.extractfile(self.info)
        assert file is not None
        return file.read()


def list_members(uri: str, setting: str) -> Iterator[Listed]:
    """Yield an archive's files in their order. Raise UserError, naming the setting, if it is damaged."""
    with storage.open_stream(uri) as stream:
        for member in _members(stream, uri, setting):
            yield Listed(member.name, member.info.size, str(member.info.mtime))


def read_photos(uri: str, requested: pa.Table, batch_rows: int, setting: str) -> Iterator[pa.Table]:
    """Yield requested photos as tables of LOADED with batch_rows rows each.

    requested: rows of INPUT in the archive's order. Raise UserError, naming the setting, if the archive is damaged.
    """
    inputs = (row for batch in requested.to_batches(max_chunksize=batch_rows) for row in batch.to_pylist())
    next_input, loaded = next(inputs, None), []
    with storage.open_stream(uri) as stream:
        for member in _members(stream, uri, setting):
            if next_input is None:
                break
            if member.name == next_input["key"]:
                loaded.append({**next_input, "data": member.read(), "error": None})
                next_input = next(inputs, None)
            if len(loaded) == batch_rows:
                yield pa.Table.from_pylist(loaded, LOADED)
                loaded = []
    if loaded:
        yield pa.Table.from_pylist(loaded, LOADED)


def _members(stream: BinaryIO, uri: str, setting: str) -> Iterator[Member]:
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for info in archive:
                if info.isfile():
                    yield Member(info.name.removeprefix("./"), archive, info)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"`{setting}`: {uri} is not a readable tar archive ({error}). Copy it again.") from error
