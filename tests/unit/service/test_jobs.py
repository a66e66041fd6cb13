"""The job store on a real SQLite file: transitions, promises about repeated uploads, what is left after the server has died."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from models.errors import Conflict, NotFound
from service.errors import IdempotencyConflict, JobsUnavailable, QueueFull
from service.jobs import Jobs

CONFIG = {"name": "cifar"}


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def do(runner: asyncio.Runner) -> Callable[[Any], Any]:
    """Runs one coroutine; the loop stays the same for the whole test."""
    return runner.run


@pytest.fixture
def jobs(tmp_path: Path, do: Callable[[Any], Any]) -> Iterator[Jobs]:
    store = Jobs(tmp_path / "jobs.sqlite", most_queued=3)
    do(store.open())
    yield store
    do(store.close())


def on_disk(tmp_path: Path, job_id: str) -> str:
    """The state that another process, or the next one, would find."""
    connection = sqlite3.connect(tmp_path / "jobs.sqlite")
    try:
        return str(connection.execute("SELECT state FROM jobs WHERE id = ?", (job_id,)).fetchone()[0])
    finally:
        connection.close()


def test_a_job_goes_from_queued_over_running_to_succeeded(jobs: Jobs, do: Callable[[Any], Any], tmp_path: Path) -> None:
    job = do(jobs.add("a", CONFIG, "digest", None))
    assert (job.id, job.state, job.config, job.attempts, job.started, job.ended) == ("a", "queued", CONFIG, 0, None, None)
    assert on_disk(tmp_path, "a") == "queued"
    claimed = do(jobs.claim())
    assert (claimed.id, claimed.state, claimed.attempts) == ("a", "running", 1)
    assert on_disk(tmp_path, "a") == "running"
    do(jobs.end("a", "succeeded", {"version": 1}))
    ended = do(jobs.get("a"))
    assert (ended.state, ended.outcome) == ("succeeded", {"version": 1})
    assert ended.created <= ended.started <= ended.ended


def test_the_oldest_is_claimed_first_and_the_newest_listed_first(jobs: Jobs, do: Callable[[Any], Any]) -> None:
    for job_id in ("b", "a", "c"):
        do(jobs.add(job_id, CONFIG, "digest", None))
    assert [job.id for job in do(jobs.recent(2))] == ["c", "a"]
    assert [do(jobs.claim()).id for _ in range(3)] == ["b", "a", "c"]
    assert do(jobs.claim()) is None


def test_a_report_is_read_for_whom_asks_for_it_and_for_nobody_else(jobs: Jobs, do: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    do(jobs.add("a", CONFIG, "digest", "key"))
    do(jobs.claim())
    report = {"figures": ["a figure"] * 100}
    do(jobs.end("a", "succeeded", {"guard": "cifar", "version": 1, "report": report}))
    read, loads = list[int](), json.loads
    monkeypatch.setattr(json, "loads", lambda text: read.append(len(text)) or loads(text))
    for job in (do(jobs.get("a")), *do(jobs.recent(10)), *do(jobs.in_state("succeeded")), do(jobs.add("b", CONFIG, "digest", "key"))):
        assert job.outcome == {"guard": "cifar", "version": 1}
    assert max(read) < 100
    assert do(jobs.report("a")) == report
    do(jobs.add("c", CONFIG, "digest", None))
    for other in ("c", "x"):
        with pytest.raises(NotFound):
            do(jobs.report(other))


def test_a_new_job_wakes_the_worker(jobs: Jobs, do: Callable[[Any], Any]) -> None:
    assert not jobs.changed.is_set()
    do(jobs.add("a", CONFIG, "digest", None))
    assert jobs.changed.is_set()


def test_what_does_not_exist_is_not_found(jobs: Jobs, do: Callable[[Any], Any]) -> None:
    for call in (jobs.get("x"), jobs.cancel("x")):
        with pytest.raises(NotFound):
            do(call)


@pytest.mark.parametrize("job_id", ["' OR 1=1 --", "%00", "a" * 10_000, "\u0661", "\x00"])
def test_d12_an_id_is_only_ever_compared(jobs: Jobs, do: Callable[[Any], Any], job_id: str) -> None:
    do(jobs.add("a", CONFIG, "digest", None))
    with pytest.raises(NotFound):
        do(jobs.get(job_id))


@pytest.mark.parametrize(
    ("before", "state"),
    [("", "queued"), ("claim end", "failed"), ("cancel", "cancelled"), ("claim cancel", "cancelled")],
    ids=["one that waits does not", "one that has ended does not", "one cancelled in the queue does not", "one cancelled while it ran does not"],
)
def test_only_a_running_job_ends(jobs: Jobs, do: Callable[[Any], Any], before: str, state: str) -> None:
    do(jobs.add("a", CONFIG, "digest", None))
    steps: dict[str, Callable[[], Any]] = {"claim": jobs.claim, "end": lambda: jobs.end("a", "failed", {}), "cancel": lambda: jobs.cancel("a")}
    for step in before.split():
        do(steps[step]())
    with pytest.raises(Conflict):
        do(jobs.end("a", "succeeded", {}))
    assert do(jobs.get("a")).state == state


def test_a_queued_and_a_running_job_can_be_cancelled(jobs: Jobs, do: Callable[[Any], Any]) -> None:
    do(jobs.add("queued", CONFIG, "digest", None))
    assert do(jobs.cancel("queued")) == "queued"
    assert do(jobs.claim()) is None
    do(jobs.add("running", CONFIG, "digest", None))
    do(jobs.claim())
    assert do(jobs.cancel("running")) == "running"


def test_d14_to_cancel_again_changes_nothing_and_to_cancel_what_has_ended_is_a_conflict(jobs: Jobs, do: Callable[[Any], Any]) -> None:
    do(jobs.add("a", CONFIG, "digest", None))
    do(jobs.cancel("a"))
    ended = do(jobs.get("a")).ended
    assert do(jobs.cancel("a")) == "cancelled"
    assert do(jobs.get("a")).ended == ended
    do(jobs.add("b", CONFIG, "digest", None))
    do(jobs.claim())
    do(jobs.end("b", "failed", {"code": "x"}))
    with pytest.raises(Conflict):
        do(jobs.cancel("b"))
    assert do(jobs.get("b")).outcome == {"code": "x"}


def test_g8_no_more_may_wait_than_the_queue_holds(jobs: Jobs, do: Callable[[Any], Any]) -> None:
    for job_id in "abc":
        do(jobs.room(None))
        do(jobs.add(job_id, CONFIG, "digest", None))
    for call in (jobs.room(None), jobs.add("d", CONFIG, "digest", None)):
        with pytest.raises(QueueFull):
            do(call)
    do(jobs.claim())  # what runs does not wait
    do(jobs.room(None))
    assert do(jobs.add("d", CONFIG, "digest", None)).state == "queued"


def test_b21_the_same_upload_under_the_same_key_is_the_same_job(jobs: Jobs, do: Callable[[Any], Any]) -> None:
    do(jobs.add("a", CONFIG, "digest", "key"))
    assert do(jobs.add("b", CONFIG, "digest", "key")).id == "a"
    with pytest.raises(IdempotencyConflict):
        do(jobs.add("c", CONFIG, "another digest", "key"))
    assert [job.id for job in do(jobs.recent(10))] == ["a"]
    assert do(jobs.add("d", CONFIG, "digest", "another key")).id == "d"
    assert do(jobs.add("e", CONFIG, "digest", None)).id == "e"


def test_b21_a_repeated_upload_finds_its_job_though_the_queue_is_full(jobs: Jobs, do: Callable[[Any], Any]) -> None:
    for job_id in "abc":
        do(jobs.add(job_id, CONFIG, "digest", f"key {job_id}"))
    do(jobs.room("key b"))
    assert do(jobs.add("z", CONFIG, "digest", "key b")).id == "b"


def test_g10_the_same_key_from_many_at_once_makes_one_job(jobs: Jobs, do: Callable[[Any], Any]) -> None:
    async def many() -> list[str]:
        return [job.id for job in await asyncio.gather(*(jobs.add(f"job {i}", CONFIG, "digest", "key") for i in range(20)))]

    assert len(set(do(many()))) == 1
    assert len(do(jobs.recent(10))) == 1


def restart(tmp_path: Path, do: Callable[[Any], Any], jobs: Jobs) -> Jobs:
    do(jobs.close())
    again = Jobs(tmp_path / "jobs.sqlite", most_queued=3)
    do(again.open())
    return again


def test_p6_what_was_acknowledged_is_there_after_a_restart(do: Callable[[Any], Any], tmp_path: Path) -> None:
    first = Jobs(tmp_path / "jobs.sqlite", most_queued=3)
    do(first.add("a", CONFIG, "digest", None))
    second = restart(tmp_path, do, first)
    assert do(second.get("a")).state == "queued"
    do(second.close())


def test_what_ran_when_the_server_died_is_tried_once_more_and_then_failed(jobs: Jobs, do: Callable[[Any], Any]) -> None:
    do(jobs.add("a", CONFIG, "digest", None))
    do(jobs.claim())
    assert [job.id for job in do(jobs.in_state("running"))] == ["a"]
    do(jobs.recover())
    again = do(jobs.get("a"))
    assert (again.state, again.attempts, again.started) == ("queued", 1, None)
    do(jobs.claim())
    do(jobs.recover())
    lost = do(jobs.get("a"))
    assert (lost.state, lost.outcome["code"], lost.outcome["status"]) == ("failed", "internal", 500)
    assert lost.ended is not None
    assert do(jobs.in_state("queued", "running")) == []


def test_a_job_put_back_at_shutdown_has_lost_no_attempt(jobs: Jobs, do: Callable[[Any], Any]) -> None:
    do(jobs.add("a", CONFIG, "digest", None))
    for _ in range(5):
        do(jobs.claim())
        do(jobs.requeue("a"))
    assert (do(jobs.get("a")).state, do(jobs.get("a")).attempts) == ("queued", 0)
    do(jobs.cancel("a"))
    do(jobs.requeue("a"))
    assert do(jobs.get("a")).state == "cancelled"


def test_x21_a_file_that_is_no_database_makes_jobs_unavailable_until_it_is_mended(do: Callable[[Any], Any], tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(b"this is no database" * 100)
    store = Jobs(path, most_queued=3)
    for _ in range(2):
        with pytest.raises(JobsUnavailable):
            do(store.recent(1))
    path.unlink()
    assert do(store.recent(1)) == []
    do(store.close())


def test_x21_closing_does_not_need_the_database(do: Callable[[Any], Any], tmp_path: Path) -> None:
    store = Jobs(tmp_path / "missing" / "jobs.sqlite", most_queued=3)
    with pytest.raises(JobsUnavailable):
        do(store.open())
    do(store.close())


def a_used_file(folder: Path) -> Path:
    """A database with a hundred jobs in it, as a server leaves it."""

    async def fill() -> None:
        store = Jobs(folder / "jobs.sqlite", most_queued=1000)
        for number in range(100):
            await store.add(f"job {number}", {"name": "cifar", "padding": "x" * 300}, "digest", None)
        await store.close()

    with asyncio.Runner() as own:
        own.run(fill())
    return folder / "jobs.sqlite"


def zeroed(data: bytes, begin: int, end: int) -> bytes:
    return data[:begin] + bytes(end - begin) + data[end:]


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"no database" * 1000, lambda data: zeroed(data, 0, 100), lambda data: data[: len(data) // 2], lambda data: zeroed(data, 8192, 20480)],
    ids=["replaced", "with a zeroed header", "cut in half", "with zeroed pages inside"],
)
def test_x21_a_damaged_file_stays_byte_for_byte_as_it_is_whatever_is_asked(do: Callable[[Any], Any], tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = a_used_file(tmp_path)
    sound = path.read_bytes()
    path.write_bytes(damage(sound))
    damaged = path.read_bytes()
    store = Jobs(path, most_queued=1000)
    for call in (store.open, store.recover, lambda: store.add("new", CONFIG, "digest", None), store.claim):
        with pytest.raises(JobsUnavailable):
            do(call())
        assert not store.available
    assert path.read_bytes() == damaged
    path.write_bytes(sound)
    do(store.open())
    assert store.available
    assert len(do(store.recent(1000))) == 100
    do(store.close())


def test_x21_jobs_that_are_left_in_the_wal_alone_are_not_deleted(do: Callable[[Any], Any], jobs: Jobs, tmp_path: Path) -> None:
    do(jobs.add("a", CONFIG, "digest", None))
    other = tmp_path / "other"
    other.mkdir()
    wal = other / "jobs.sqlite-wal"
    wal.write_bytes((tmp_path / "jobs.sqlite-wal").read_bytes())
    store = Jobs(other / "jobs.sqlite", most_queued=3)
    with pytest.raises(JobsUnavailable):
        do(store.open())
    assert wal.read_bytes() == (tmp_path / "jobs.sqlite-wal").read_bytes()
    (other / "jobs.sqlite").write_bytes((tmp_path / "jobs.sqlite").read_bytes())
    assert do(store.get("a")).state == "queued"
    do(store.close())


def test_x21_the_log_says_once_which_file_it_is_why_and_what_to_do(do: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.LOCK_SECONDS", 0.01)
    path = a_used_file(tmp_path)
    store = Jobs(path, most_queued=1000)
    with capture_logs() as logs:
        locker = sqlite3.connect(path, isolation_level=None)
        locker.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            with pytest.raises(JobsUnavailable):
                do(store.open())
        locker.close()
        do(store.open())
        do(store.close())
        path.write_bytes(b"no database" * 1000)
        store = Jobs(path, most_queued=1000)
        with pytest.raises(JobsUnavailable):
            do(store.open())
        do(store.close())
    assert [entry["event"] for entry in logs] == ["jobs_unavailable", "jobs_available", "jobs_unavailable"]
    assert {entry["file"] for entry in logs} == {str(path)}
    locked, _, damaged = logs
    assert "locked" in locked["reason"] and "by itself" in locked["remedy"]
    assert "not a database" in damaged["reason"] and "Move it away" in damaged["remedy"]


def test_x21_a_call_that_fails_wakes_the_worker_which_tries_until_the_database_is_back(do: Callable[[Any], Any], tmp_path: Path) -> None:
    broken = Jobs(tmp_path / "missing" / "jobs.sqlite", most_queued=3)
    with pytest.raises(JobsUnavailable):
        do(broken.recent(1))
    assert broken.changed.is_set()
    do(broken.close())
