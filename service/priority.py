"""Who goes first where all cores are busy: the event loop, then the threads that work on images and guards, then calibrations.

The event loop holds the interpreter's lock most of the time that it runs. Where it has to wait for a core, every thread that judges soon waits for the lock,
and the other cores are idle. So it goes first, though what it does in a storm is mostly to refuse. On Linux each thread has a niceness of its own, and hands
it on to the threads that it starts.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

WORK = 5  # a third of a core's time beside the event loop
CALIBRATION = 15  # a tenth beside a thread that works


def working(workers: int, name: str) -> ThreadPoolExecutor:
    """A pool of threads that let the event loop go first. They are all there already: later the process may be allowed no more of them."""
    pool, all_there = ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=step_back, initargs=(WORK,)), threading.Barrier(workers)
    for each in [pool.submit(all_there.wait) for _ in range(workers)]:
        each.result()
    return pool


def step_back(niceness: int, process: int | None = None) -> None:
    """Make the calling thread, or a process that has just been started, at least so nice, and what it starts from now on. Only Linux can.

    It cannot be taken back: less niceness needs a privilege.
    """
    if sys.platform == "linux":
        who = threading.get_native_id() if process is None else process
        with suppress(ProcessLookupError):  # it has ended already
            os.setpriority(os.PRIO_PROCESS, who, max(niceness, os.getpriority(os.PRIO_PROCESS, who)))
