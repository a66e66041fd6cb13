"""Who goes first where all cores are busy: the threads that judge, then everything else.

In a storm the event loop has a refusal to write for nearly every request. At the same priority it would take the cores from the threads that judge what was
admitted: the more is refused, the less is answered. On Linux each thread has a niceness of its own, and hands it on to the threads and processes that it
starts; so those that must not step back are started before.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

NICENESS = 10  # a tenth of a core's time beside a thread that is not nice


def at_full_priority(workers: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads are all there already."""
    pool, all_there = ThreadPoolExecutor(workers, thread_name_prefix=name), threading.Barrier(workers)
    for each in [pool.submit(all_there.wait) for _ in range(workers)]:
        each.result()
    return pool


def step_back() -> None:
    """Make the calling thread, and what it starts from now on, give way. It cannot be taken back. Elsewhere than on Linux nothing happens."""
    if sys.platform == "linux":
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, max(NICENESS, os.getpriority(os.PRIO_PROCESS, me)))  # never towards less: that needs a privilege
