"""Members of tar archives, read sequentially, with the checks that unpacking would do."""

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from tarfile import EmptyHeaderError, EOFHeaderError  # type: ignore[attr-defined] # missing in the stubs
from typing import IO, Any, BinaryIO, Self, cast

import pyarrow as pa

from carclass.ingestion import members
from carclass.ingestion.members import ArchiveError, Member, clean_name, link_target

SKIP_BYTES = 2**20
COMPRESSED_BYTES = 2**16
"""Compressed bytes that are read at once."""
XZ_MAGIC = b"\xfd7zXZ\0"
MAX_HEADER_BYTES = 2**20
"""Limit of a header with a long name or extended attributes, which is held in memory."""
MAX_XZ_BYTES = 2**29
"""Limit of the memory of an xz decompressor; the tool's own levels need a tenth of it."""
MAX_EXPANSION, EXPANSION_BYTES = 200, 64 * 2**30
"""Limit of the factor by which an archive of more than so many bytes expands; one of photos expands by little."""
EXTENDED_HEADERS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
KINDS = {tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a named pipe"}
GNU_MAGIC = b"ustar  \0"
IGNORED = (b"V", b"D")
"""GNU tar's types for the name of a volume and for a folder with the names of its files."""


def read_tar(source: BinaryIO) -> Iterator[Member]:
    """Yield the members of a tar archive, compressed or not, or of several that were joined.

    source: seekable. Raise tarfile.ReadError or an error of the decompressor if the archive is damaged or incomplete.
    """
    stream = cast(Any, _ForwardStream(source))
    with _Tar(
        fileobj=stream, tarinfo=_Header, ignore_zeros=True, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        while (header := archive.next()) is not None:
            archive.members.clear()
            if header.type not in IGNORED:
                yield _member(archive, header)


def _member(archive: tarfile.TarFile, header: tarfile.TarInfo) -> Member:
    content = _Content(archive, header)
    member = Member(header.name, header.size, content.read, content.checksum)
    if header.isdir():
        return member._replace(is_folder=True)
    if header.issym():
        return member._replace(target=link_target(header.name, header.linkname))
    if header.islnk():
        return member._replace(target=clean_name(header.linkname), is_hard_link=True)
    return member if header.isfile() else member._replace(rejected=KINDS.get(header.type, "of an unknown type"))


class _Content:
    """Bytes of a member, which can be read only once, since the archive cannot be rewound."""

    def __init__(self, archive: tarfile.TarFile, header: tarfile.TarInfo) -> None:
        self.archive, self.header = archive, header
        self.crc: int | None = None  # of the bytes that were read

    def read(self) -> bytes:
        """Return the bytes."""
        data = self._open().read()
        self.crc = zlib.crc32(data)
        return data

    def checksum(self) -> str:
        """Return the CRC-32 of the bytes, read now if they were not; "" for a member that is not read at all.

        The time of modification does not tell a replaced file: reproducible archives have the same for all.
        """
        if not self.header.isfile() or self.header.size > members.MAX_PHOTO_BYTES:
            return ""
        if self.crc is None:
            file, self.crc = self._open(), 0
            while block := file.read(SKIP_BYTES):
                self.crc = zlib.crc32(block, self.crc)
        return f"{self.crc:08x}"

    def _open(self) -> IO[bytes]:
        file = self.archive.extractfile(self.header)
        assert file is not None
        return file


class _Tar(tarfile.TarFile):
    """Archive that remembers if the last block ended it."""

    ended = False
    members: list[tarfile.TarInfo]  # collected for random access


class _Header(tarfile.TarInfo):
    """Header whose damage is an error; tarfile takes it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Parse a block. Raise ReadError if its size would exhaust the memory."""
        if not any(buf) and len(buf) < tarfile.BLOCKSIZE:
            buf = b""  # the rest of the padding
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in EXTENDED_HEADERS and header.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header with the size {header.size}")
        if buf[257:265] == GNU_MAGIC and not header.isdir():  # its incremental archives have times instead of a prefix
            header.name = bytes(buf[:100]).partition(b"\0")[0].decode(encoding, errors)
        return header

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        """Read the next header. Raise EOFHeaderError for a block of zeros, EmptyHeaderError at the end of the file."""
        archive = cast(_Tar, tarfile_)
        try:
            header = super().fromtarfile(archive)
        except EOFHeaderError:
            archive.ended = True
            raise
        except EmptyHeaderError:
            if not archive.ended:
                raise tarfile.ReadError("it is cut off: its end is missing") from None
            raise
        except (tarfile.HeaderError, ValueError, IndexError, RecursionError) as error:
            kind = "data after its end" if archive.ended else "a damaged header"
            raise tarfile.ReadError(f"{kind} at byte {archive.offset:,}: {error}") from error
        archive.ended = False
        return header


class _ForwardStream:
    """Decompressed bytes of an archive, in which tarfile can skip forward."""

    def __init__(self, source: BinaryIO) -> None:
        self.source, self.stream, self.position = source, _decompress(source), 0

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return True

    def read(self, size: int) -> bytes:
        data: bytes = self.stream.read(size)
        self.position += len(data)
        if self.position > max(EXPANSION_BYTES, MAX_EXPANSION * self.source.tell()):
            raise ArchiveError(
                f"it expands to more than {MAX_EXPANSION} times its size", "Check its origin: photos do not."
            )
        return data

    def seek(self, position: int) -> None:
        if position < self.position:
            raise tarfile.ReadError(f"a member with a wrong size before byte {self.position:,}")
        while position > self.position and self.read(min(position - self.position, SKIP_BYTES)):
            pass


def _decompress(source: BinaryIO) -> Any:
    """Return a stream of the decompressed bytes. The first bytes decide, not the name."""
    start = source.read(6)
    source.seek(0)
    if start[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=source)
    if start[:3] == b"BZh" and start[4:] in (b"1A", b"\x17r"):
        return io.BufferedReader(_Streams(source, b"BZh", bz2.BZ2Decompressor))
    if start == XZ_MAGIC:
        return io.BufferedReader(_Streams(source, XZ_MAGIC, lambda: lzma.LZMADecompressor(memlimit=MAX_XZ_BYTES)))
    if start[:4] == b"\x28\xb5\x2f\xfd" or start[1:4] == b"\x2a\x4d\x18":  # a frame, or one to skip
        return pa.CompressedInputStream(source, "zstd")
    return source


class _Streams(io.RawIOBase):
    """Decompressed bytes of joined bzip2 or xz streams; the standard library ignores damage after the first."""

    def __init__(self, source: BinaryIO, magic: bytes, new_decompressor: Callable[[], Any]) -> None:
        self.source, self.magic, self.new_decompressor = source, magic, new_decompressor
        self.decompressor = new_decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        target, data = memoryview(buffer), b""
        while not data:
            if self.decompressor.eof:
                compressed = self._start_of_next_stream()
                if not compressed:
                    return 0
                self.decompressor = self.new_decompressor()
            else:
                compressed = self.source.read(COMPRESSED_BYTES) if self.decompressor.needs_input else b""
                if self.decompressor.needs_input and not compressed:
                    raise EOFError("it is cut off: the end of the compressed data is missing")
            data = self.decompressor.decompress(compressed, len(target))
        target[: len(data)] = data
        return len(data)

    def _start_of_next_stream(self) -> bytes:
        """Return compressed bytes after the padding of a stream; none at the end of the file."""
        rest: bytes = self.decompressor.unused_data.lstrip(b"\0")
        while not rest and (block := self.source.read(COMPRESSED_BYTES)):
            rest = block.lstrip(b"\0")
        if not rest.startswith(self.magic[: len(rest)]):
            raise tarfile.ReadError("data after its end")
        return rest
