"""Who works in a folder, among the processes of a machine: a lock of the folder itself, which whatever ends a process gives back.

So what a crash left behind is told from what somebody is writing at this moment, and one of several servers does what only one may.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def claim(folder: Path) -> int | None:
    """A descriptor that holds a folder until it is closed; None where another holds it, in this process or elsewhere. Raises OSError where there is none.

    On a file system that has no locks every claim succeeds.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(handle)
            raise
    return handle


@contextmanager
def claimed(make: Callable[[], Path]) -> Iterator[Path]:
    """Make a folder and hold it, whatever becomes of its name. make: makes one under a new name; asked again where a collection came before the claim."""
    while (handle := _claim_new(folder := make())) is None:
        pass
    try:
        yield folder
    finally:
        os.close(handle)


def _claim_new(folder: Path) -> int | None:
    with suppress(FileNotFoundError):
        handle = claim(folder)
        if handle is None or folder.exists():
            return handle
        os.close(handle)  # of a folder that was removed before it was locked
    return None


@contextmanager
def all_unclaimed(folders: Iterable[Path]) -> Iterator[list[Path]]:
    """Those in which nobody works; within the block nobody else does."""
    with ExitStack() as held:
        free = []
        for folder in folders:
            with suppress(OSError):  # no folder, or gone meanwhile
                handle = claim(folder)
                if handle is not None:
                    held.callback(os.close, handle)
                    free.append(folder)
        yield free


def remove_unclaimed(folders: Iterable[Path]) -> int:
    """Remove those in which nobody works; returns how many."""
    with all_unclaimed(folders) as free:
        for folder in free:
            shutil.rmtree(folder, ignore_errors=True)
    return len(free)
