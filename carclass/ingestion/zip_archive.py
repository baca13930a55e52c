"""Members of zip archives, from their directory."""

import io
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import BinaryIO

from carclass.ingestion.members import ArchiveError, Member, UnreadableMemberError, link_target

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
HEADER_BYTES = 30
"""Size of the header before a member's name and content."""
MARK_BYTES = 4
"""Size of the mark before an archive that could have had several parts."""
END, END_SIGNATURE = struct.Struct("<4s4H2LH"), b"PK\5\6"
"""Record at the end: signature, three numbers of disks, number of members, size and place of the directory, and the
size of a comment."""
ZIP64 = 0xFFFF
"""Number that refers to a record of larger numbers."""
MAX_LINK_BYTES = 4096
ENCRYPTED, UTF8 = 0x1, 0x800
"""Flags of a member."""
DOS = 0
"""System on which names have the character set of DOS."""


def read_zip(source: BinaryIO) -> Iterator[Member]:
    """Yield the members of a zip archive in the order of their contents, so that all are read in one pass.

    source: seekable. Raise zipfile.BadZipFile if the directory is damaged, ArchiveError if the archive is encrypted.
    """
    with zipfile.ZipFile(source) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        _check_end(source, archive, len(infos))
        _check_layout(infos, archive.start_dir)
        for info in infos:
            if info.file_size or not _decode_name(info).endswith("/"):
                _check_method(info)
                yield _member(archive, info)


def _check_end(source: BinaryIO, archive: zipfile.ZipFile, num_members: int) -> None:
    """Check that the file ends with the archive, and that the directory has as many members as are noted there."""
    start = source.seek(0, io.SEEK_END) - END.size - len(archive.comment)
    source.seek(max(0, start))
    signature, _, _, _, noted, _, _, _ = END.unpack(source.read(END.size))
    if signature != END_SIGNATURE:
        raise zipfile.BadZipFile("data after its end")
    if noted not in (num_members, ZIP64):
        raise zipfile.BadZipFile(f"{num_members:,} members in its directory, not {noted:,} as noted at its end")


def _check_layout(infos: Sequence[zipfile.ZipInfo], directory_offset: int) -> None:
    """Check that the contents begin with the file and do not overlap, as in joined archives and bombs."""
    if not infos:
        return
    if any(info.volume for info in infos):
        raise ArchiveError("it is the last part of several", "Join them first: `zip -s 0 PARTS.zip --out WHOLE.zip`.")
    if not 0 <= infos[0].header_offset <= MARK_BYTES:
        raise zipfile.BadZipFile(
            f"its first {infos[0].header_offset:,} bytes are not in its directory, as if several files were joined"
        )
    ends = [info.header_offset + HEADER_BYTES + info.compress_size for info in infos]
    starts = [*(info.header_offset for info in infos[1:]), directory_offset]
    for info, end, start in zip(infos, ends, starts, strict=True):
        if end > start:
            raise zipfile.BadZipFile(f"the content of {info.filename} overlaps with the next one")


def _check_method(info: zipfile.ZipInfo) -> None:
    if info.flag_bits & ENCRYPTED:
        raise ArchiveError(f"{info.filename} is encrypted", "Unpack it, and create it again without a password.")
    if info.compress_type not in METHODS:
        problem = f"{info.filename} is compressed by the method {info.compress_type}, not by deflate"
        raise ArchiveError(problem, "Unpack it, and create it again with `zip -r`.")


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    name = _decode_name(info)
    member = Member(name, info.file_size, partial(_read, archive, info), lambda: f"{info.CRC:08x}")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind == stat.S_IFLNK and info.file_size <= MAX_LINK_BYTES:
        link = member.read().decode("utf-8", "surrogateescape")
        return member._replace(target=link_target(name, link))
    is_file = kind in (0, stat.S_IFREG) or info.file_size > 0  # a file from a pipe is marked as a pipe
    return member if is_file else member._replace(rejected="a special file")


def _decode_name(info: zipfile.ZipInfo) -> str:
    """Return the name, with slashes, as UTF-8 if it can be: many tools write UTF-8 without the flag that says so."""
    name = info.filename
    if not info.flag_bits & UTF8:
        utf8 = info.orig_filename.encode("cp437").decode("utf-8", "surrogateescape")
        name = utf8 if info.create_system != DOS or utf8.isprintable() else name
    return name.replace("\\", "/")


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return a member's content, no longer than the directory says. Raise UnreadableMemberError if it is damaged."""
    try:
        with archive.open(info) as file:
            return file.read(info.file_size)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UnreadableMemberError(f"damaged in the zip archive: {error}") from error
