"""Threads that are there before the others step back keep their priority."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.priority import NICENESS, at_full_priority, step_back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness of their own")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_who_steps_back_takes_along_only_what_starts_later() -> None:
    usual, less = niceness(), max(NICENESS, niceness())

    def loop() -> tuple[int, int, int]:
        with at_full_priority(2, "before") as before:
            step_back()
            step_back()  # changes nothing more
            with ThreadPoolExecutor(1) as after:
                return niceness(), before.submit(niceness).result(), after.submit(niceness).result()

    with ThreadPoolExecutor(1) as own:  # what steps back here is this thread alone
        assert own.submit(loop).result() == (less, usual, less)
    assert niceness() == usual


def test_all_threads_are_there_at_once() -> None:
    with at_full_priority(3, "early"):
        assert sum(thread.name.startswith("early") for thread in threading.enumerate()) == 3
