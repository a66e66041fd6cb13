"""Who goes first where all cores are busy: the event loop, then the threads that work on images and guards, then calibrations.

The event loop holds the interpreter's lock most of the time that it runs. Where it has to wait for a core, every thread that judges soon waits for the lock,
and the other cores are idle. So it goes first, though what it does in a storm is mostly to refuse. On Linux each thread has a niceness of its own, and hands
it on to the threads that it starts; elsewhere nothing of this happens.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

WORK = 5  # a quarter of a core beside the event loop
CALIBRATION = 15  # a tenth of a core beside a thread that works


def working(workers: int, name: str) -> ThreadPoolExecutor:
    """A pool of threads that let the event loop go first. All are there already, since later the process may be allowed no more. Raises RuntimeError."""
    pool, all_there = ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=step_back, initargs=(WORK,)), threading.Barrier(workers)
    try:
        for each in [pool.submit(all_there.wait) for _ in range(workers)]:
            each.result()
    except RuntimeError:
        all_there.abort()  # the interpreter would wait for those that are there
        raise
    return pool


def step_back(niceness: int) -> None:
    """Make the calling thread at least so nice. It cannot be taken back: less niceness needs a privilege."""
    if sys.platform == "linux":
        _renice(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def put_back(process: int, *, leads: bool) -> None:
    """Have a process that was just started give way to all that serves. leads: a session of its own.

    Where the kernel groups processes by their sessions for the scheduler, niceness is of the group, too.
    """
    if sys.platform == "linux":
        with suppress(ProcessLookupError):  # it has ended already
            _renice(os.PRIO_PGRP if leads else os.PRIO_PROCESS, process, CALIBRATION)
        if leads:
            with suppress(OSError):
                Path(f"/proc/{process}/autogroup").write_text(str(CALIBRATION))


def _renice(kind: int, who: int, niceness: int) -> None:
    os.setpriority(kind, who, max(niceness, os.getpriority(kind, who)))
