"""Who lets whom go first."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.priority import CALIBRATION, WORK, put_back, step_back, working

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
@pytest.mark.parametrize("leads", [True, False], ids=["leader", "in our group"])
def test_a_process_is_put_back_and_one_that_has_ended_is_let_be(leads: bool) -> None:
    usual = niceness()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=leads) as process:
        put_back(process.pid, leads=leads)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == max(CALIBRATION, usual)
        process.communicate(b"\n")
    put_back(process.pid, leads=leads)
    assert niceness() == usual


@linux
def test_the_session_of_a_process_is_put_back_with_it_and_ours_is_not() -> None:
    ours = Path("/proc/self/autogroup")
    usual = ours.read_text() if ours.exists() else ""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as process:
        try:
            its = Path(f"/proc/{process.pid}/autogroup")
            if not its.exists() or not its.read_text():
                pytest.skip("this kernel does not group processes by their sessions")
            for _ in range(50):  # it takes a change only every tenth of a second, of all who have no privilege together
                put_back(process.pid, leads=True)
                if its.read_text().split()[1:] == ["nice", str(CALIBRATION)]:
                    break
                time.sleep(0.1)
            assert its.read_text().split()[1:] == ["nice", str(CALIBRATION)]
        finally:
            process.communicate(b"\n")
    assert (ours.read_text() if ours.exists() else "") == usual


def test_all_threads_are_there_at_once() -> None:
    with working(3, "early"):
        assert sum(thread.name.startswith("early") for thread in threading.enumerate()) == 3


def test_where_the_process_may_have_no_more_threads_those_that_are_there_end(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def at_most_two(thread: threading.Thread) -> None:
        if thread.name.startswith("few_2"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", at_most_two)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        working(3, "few")
    gc.collect()  # an executor that nobody has any more lets its threads go
    for thread in threading.enumerate():
        if thread.name.startswith("few"):
            thread.join(10.0)
            assert not thread.is_alive()
