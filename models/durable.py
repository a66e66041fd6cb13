"""The one helper that writes to disk so that it stays: contents, then the name, each flushed before the next step counts.

A file appears whole or not at all, under any crash. A failed flush is a failure: the file is discarded, never flushed again and called good.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models.errors import StorageFull, StorageUnwritable


@contextmanager
def storage_errors() -> Iterator[None]:
    """Turn a full disk or quota into StorageFull, one that may not be written into StorageUnwritable."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StorageUnwritable from error
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write `data` under `path`, replacing what is there, atomically and durably; mode 0644 under the umask. What fails leaves what was there."""
    partial, former = (path.with_name(f".{path.name}.{uuid.uuid4().hex}.{kind}") for kind in ("partial", "former"))
    with storage_errors():
        try:
            with open(partial, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            new = not path.exists()
            with suppress(OSError):  # nothing is there, or the file system has no second names: then what was there cannot be put back
                os.link(path, former)
            os.replace(partial, path)
            sync_folder(path.parent, path.unlink if new else lambda: os.replace(former, path))
        finally:
            for left in (partial, former):
                with suppress(OSError):
                    left.unlink()


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


def sync_folder(path: Path, undo: Callable[[], object] = lambda: None) -> None:
    """Make the names in a folder durable. undo: takes back what was done to them, since a change that failed must not come into force with a restart."""
    try:
        _sync_folder(path)
    except OSError:
        with suppress(OSError):
            undo()
            _sync_folder(path)
        raise


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
