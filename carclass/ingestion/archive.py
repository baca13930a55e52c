"""Photos in a .tgz or .tar: read from front to back, as nothing else is possible, and so by one process."""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from carclass import storage
from carclass.data.inventory import INPUT
from carclass.errors import UserError

SUFFIXES = (".tgz", ".tar.gz", ".tar")
LOADED = pa.schema([*INPUT, ("data", pa.large_binary()), ("error", pa.string())])


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    archive: tarfile.TarFile
    info: tarfile.TarInfo

    def read(self) -> bytes:
        """Its content; only while the archive stands at it."""
        file = self.archive.extractfile(self.info)
        assert file is not None
        return file.read()


def names(uri: str) -> Iterator[str]:
    """The names of an archive's files, in the order in which they lie there; UserError when it is damaged."""
    with storage.open_stream(uri) as stream:
        for member in _members(stream, uri):
            yield member.name


def read(uri: str, wanted: pa.Table, rows: int) -> Iterator[pa.Table]:
    """Some of an archive's photos as tables of LOADED with so many rows. wanted: SOURCE, in the archive's order."""
    items = (row for batch in wanted.to_batches(max_chunksize=rows) for row in batch.to_pylist())
    item, loaded = next(items, None), []
    with storage.open_stream(uri) as stream:
        for member in _members(stream, uri):
            if item is None:
                break
            if member.name == item["key"]:
                loaded.append({**item, "data": member.read(), "error": None})
                item = next(items, None)
            if len(loaded) == rows:
                yield pa.Table.from_pylist(loaded, LOADED)
                loaded = []
    if loaded:
        yield pa.Table.from_pylist(loaded, LOADED)


def _members(stream: BinaryIO, uri: str) -> Iterator[Member]:
    """The regular files of an archive, read once from front to back; UserError when it is damaged."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for info in archive:
                if info.isfile():
                    yield Member(info.name.removeprefix("./"), archive, info)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"`ingest.photos`: {uri} is no readable tar archive ({error}). Copy it again.") from error
