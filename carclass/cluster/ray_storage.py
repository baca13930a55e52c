"""File system of Ray Train's and Ray Tune's own state: on S3 through carclass.storage, with its client and retries."""

import io
from typing import Any

import pyarrow as pa
from pyarrow import fs

from carclass import storage


def ray_filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Return (storage_filesystem, storage_path) of a local folder or s3:// prefix, as Ray's run configs take them."""
    path = storage.local_path(uri)
    if path is not None:
        return fs.LocalFileSystem(), path
    return fs.PyFileSystem(S3Handler()), uri.removeprefix("s3://").rstrip("/")


class S3Handler(fs.FileSystemHandler):
    """File system of all buckets, with paths such as bucket/key; folders exist while they contain objects."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Handler)

    def __hash__(self) -> int:
        return hash(S3Handler)

    def get_type_name(self) -> str:
        return "carclass-s3"

    def normalize_path(self, path: str) -> str:
        return path.rstrip("/")

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [self._file_info(path) for path in paths]

    def _file_info(self, path: str) -> fs.FileInfo:
        if storage.exists(_uri(path)):
            return fs.FileInfo(path, fs.FileType.File)
        is_folder = bool(storage.list_files(_uri(path)))
        return fs.FileInfo(path, fs.FileType.Directory if is_folder else fs.FileType.NotFound)

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        files = storage.list_files(_uri(selector.base_dir))
        if not files and not selector.allow_not_found:
            raise FileNotFoundError(selector.base_dir)
        base, infos = selector.base_dir.rstrip("/"), {}
        for file in files:
            names = file.split("/")
            depth = len(names) if selector.recursive else 1
            for i in range(1, depth + 1):
                path = "/".join([base, *names[:i]])
                infos[path] = fs.FileInfo(path, fs.FileType.File if i == len(names) else fs.FileType.Directory)
        return list(infos.values())

    def create_dir(self, path: str, recursive: bool) -> None:
        pass

    def delete_dir(self, path: str) -> None:
        storage.delete_folder(_uri(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        storage.delete_folder(_uri(path))

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("deletion of all buckets")

    def delete_file(self, path: str) -> None:
        storage.delete(_uri(path))

    def copy_file(self, src: str, dest: str) -> None:
        storage.write_bytes(_uri(dest), storage.read_bytes(_uri(src)))

    def move(self, src: str, dest: str) -> None:
        self.copy_file(src, dest)
        self.delete_file(src)

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(storage.open_file(_uri(path)), "r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(storage.open_file(_uri(path)), "r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(_Upload(_uri(path)), "w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("appending to an object")


class _Upload(io.BytesIO):
    """Object that is written when it is closed."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.uri = uri

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            storage.write_bytes(self.uri, data)


def _uri(path: str) -> str:
    return f"s3://{path}"
