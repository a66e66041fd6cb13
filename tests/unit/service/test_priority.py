"""Who lets whom go first."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from service.priority import CALIBRATION, WORK, step_back, working

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness of their own")


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@linux
def test_threads_that_work_let_the_one_that_made_them_go_first() -> None:
    usual = niceness()
    with working(2, "work") as pool:
        assert pool.submit(niceness).result() == max(WORK, usual)
        with ThreadPoolExecutor(1) as started:
            assert pool.submit(lambda: started.submit(niceness).result()).result() == max(WORK, usual)  # what they start does so, too
    assert niceness() == usual


@linux
def test_a_thread_never_asks_for_more_than_it_has() -> None:
    def back_and_back() -> int:
        step_back(WORK)
        step_back(0)
        return niceness()

    with ThreadPoolExecutor(1) as own:
        assert own.submit(back_and_back).result() == max(WORK, niceness())


@linux
def test_a_process_steps_back_and_one_that_has_ended_is_let_be() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        step_back(CALIBRATION, process.pid)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == max(CALIBRATION, niceness())
        process.communicate(b"\n")
    step_back(CALIBRATION, process.pid)


def test_all_threads_are_there_at_once() -> None:
    with working(3, "early"):
        assert sum(thread.name.startswith("early") for thread in threading.enumerate()) == 3
