"""Check of the folder or prefix below which all results are written."""

import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from carclass import storage


def check_root(uri: str) -> None:
    """Check that a root can be written to, and leave nothing there, not even the folder.

    Raise StorageError if not, as for a file or a missing bucket.
    """
    path, probe = storage.local_path(uri), storage.join(uri, f".probe-{uuid4().hex}")
    folders = [] if path is None else [Path(path), *Path(path).parents]
    missing = [folder for folder in folders if not os.path.exists(folder)]
    if folders and os.path.isfile(existing := folders[len(missing)]):
        place = "a file" if not missing else f"a folder below {existing}, which is a file"
        raise storage.StorageError(f"`root`: {uri} is {place}. Give a folder, new or existing, for the results.")
    try:
        storage.write_bytes(probe, b"")
        storage.delete(probe)
    except storage.StorageError as error:
        raise storage.StorageError(f"`root`: {str(error).replace(probe, f'a file in {uri}')}") from error
    except FileNotFoundError as error:  # as below /proc
        raise storage.StorageError(f"`root`: {uri} cannot be written to. Check the path.") from error
    finally:
        with suppress(OSError):  # another job may write there already
            for folder in missing:
                folder.rmdir()
