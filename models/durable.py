"""The one helper that writes to disk so that it stays: contents, then the name, each flushed before the next step counts.

A file appears whole or not at all, under any crash. A failed flush is a failure: the file is discarded, never flushed again and called good.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models.errors import StorageFull


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn a full disk or quota into StorageFull."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull from error
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write `data` under `path`, replacing what is there, atomically and durably; mode 0644 under the umask."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with storage_errors():
        try:
            with open(partial, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        sync_folder(path.parent)


def sync_files(folder: Path) -> None:
    """Make durable what others wrote into a folder, and that it is there. A file system that has no room left may say so only now: raises StorageFull."""
    with storage_errors():
        for path in folder.iterdir():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(folder)
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
