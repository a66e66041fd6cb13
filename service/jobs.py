"""Owns the SQLite file of calibration jobs. States are data; a transition is one guarded UPDATE that raises where no row was in the right state.

One thread does all of the database's work: SQLite wants one writer, and a slow disk must not hold up the event loop. A job that was acknowledged
is on disk (WAL, synchronous FULL). A file that is damaged is refused and stays as it is; each call looks at it anew, so that it can be mended beneath a
running server.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import structlog

from models.durable import storage_errors
from models.errors import Conflict, NotFound
from service.errors import IdempotencyConflict, JobsUnavailable, QueueFull

State = Literal[
    "queued",  # accepted; its files are complete on disk
    "running",  # a child process works on it
    "succeeded",  # a bundle was published
    "failed",  # ended with a problem, which it keeps
    "cancelled",  # ended by an operator
]
ENDED = ("succeeded", "failed", "cancelled")
MOST_ATTEMPTS = 2  # a job that was running when the server died twice is not tried again: it may be what killed it
LOCK_SECONDS = 5.0  # to wait for another process that has the database locked
T = TypeVar("T")
log = structlog.get_logger()

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY,
    sequence INTEGER NOT NULL UNIQUE,
    state TEXT NOT NULL,
    config TEXT NOT NULL,
    created REAL NOT NULL,
    started REAL,
    ended REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    outcome TEXT,                          -- JSON: the result of a success, the problem of a failure
    idempotency_key TEXT UNIQUE,
    digest TEXT NOT NULL                   -- SHA-256 of what was uploaded, to tell a repeated request from another under its key
);
"""


# All that a `Job` has. A report may have megabytes, which only who asks for it shall pay for.
_JOBS = "SELECT id, state, config, created, started, ended, attempts, json_remove(outcome, '$.report') AS outcome, digest FROM jobs"


class _Damaged(sqlite3.DatabaseError):
    """What SQLite itself does not refuse at once."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


@dataclass(frozen=True)
class Job:
    """A calibration job as the database has it; `outcome` is without the report. Times are Unix seconds."""

    id: str
    state: State
    config: dict[str, Any]
    created: float
    started: float | None
    ended: float | None
    attempts: int
    outcome: dict[str, Any] | None


class Jobs:
    """The job store. All methods are coroutines, and raise JobsUnavailable where the database cannot be used."""

    def __init__(self, path: Path, most_queued: int) -> None:
        self._path, self._most_queued = path, most_queued
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jobs")
        self._connection: sqlite3.Connection | None = None
        self._trouble: str | None = None  # as it was logged
        self.changed = asyncio.Event()  # set whenever a job may have become ready to run

    @property
    def available(self) -> bool:
        """Whether the database could be used when it was last needed."""
        return self._connection is not None

    async def open(self) -> None:
        """See whether the database can be used; nothing else has to come after this."""
        await self._do(lambda _: None)

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        self._thread.shutdown()

    async def add(self, job_id: str, config: dict[str, Any], digest: str, key: str | None) -> Job:
        """Acknowledge a job durably. With a known Idempotency-Key, the job it made, or IdempotencyConflict; raises QueueFull."""

        def add(connection: sqlite3.Connection) -> Job:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                if key is not None:
                    known = connection.execute(f"{_JOBS} WHERE idempotency_key = ?", (key,)).fetchone()
                    if known is not None:
                        if known["digest"] != digest:
                            raise IdempotencyConflict
                        return _job(known)
                waiting = connection.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()[0]
                if waiting >= self._most_queued:
                    raise QueueFull
                row = connection.execute(
                    "INSERT INTO jobs (id, sequence, state, config, created, idempotency_key, digest) "
                    "VALUES (?, (SELECT coalesce(max(sequence), 0) + 1 FROM jobs), 'queued', ?, ?, ?, ?) RETURNING *",
                    (job_id, json.dumps(config), time.time(), key, digest),
                ).fetchone()
                return _job(row)

        job = await self._do(add)
        self.changed.set()
        return job

    async def get(self, job_id: str) -> Job:
        """Raises NotFound."""

        def get(connection: sqlite3.Connection) -> Job:
            row = connection.execute(f"{_JOBS} WHERE id = ?", (job_id,)).fetchone()
            if row is None:
                raise NotFound("There is no such calibration.")
            return _job(row)

        return await self._do(get)

    async def report(self, job_id: str) -> Any:
        """What the calibration reported, where it has succeeded. Raises NotFound."""

        def report(connection: sqlite3.Connection) -> Any:
            row = connection.execute("SELECT outcome FROM jobs WHERE id = ? AND state = 'succeeded'", (job_id,)).fetchone()
            if row is None:
                raise NotFound("There is no such report.")
            return json.loads(row["outcome"])["report"]

        return await self._do(report)

    async def recent(self, most: int) -> list[Job]:
        """The newest jobs, newest first."""
        return await self._do(lambda connection: [_job(row) for row in connection.execute(f"{_JOBS} ORDER BY sequence DESC LIMIT ?", (most,))])

    async def in_state(self, *states: State) -> list[Job]:
        """All jobs in one of these states, oldest first."""

        def found(connection: sqlite3.Connection) -> list[Job]:
            marks = ", ".join("?" * len(states))
            return [_job(row) for row in connection.execute(f"{_JOBS} WHERE state IN ({marks}) ORDER BY sequence", states)]

        return await self._do(found)

    async def room(self, key: str | None) -> None:
        """Raises QueueFull where `add` would: asked before an upload is read."""

        def room(connection: sqlite3.Connection) -> None:
            if key is not None and connection.execute("SELECT 1 FROM jobs WHERE idempotency_key = ?", (key,)).fetchone():
                return
            if connection.execute("SELECT count(*) FROM jobs WHERE state = 'queued'").fetchone()[0] >= self._most_queued:
                raise QueueFull

        await self._do(room)

    async def claim(self) -> Job | None:
        """The oldest queued job, now running; None where nothing waits."""

        def claim(connection: sqlite3.Connection) -> Job | None:
            with connection:
                row = connection.execute(
                    "UPDATE jobs SET state = 'running', started = ?, attempts = attempts + 1 "
                    "WHERE sequence = (SELECT min(sequence) FROM jobs WHERE state = 'queued') AND state = 'queued' RETURNING *",
                    (time.time(),),
                ).fetchone()
                return None if row is None else _job(row)

        return await self._do(claim)

    async def end(self, job_id: str, state: Literal["succeeded", "failed"], outcome: dict[str, Any]) -> None:
        """running -> succeeded or failed. Raises Conflict where the job was not running (it may have been cancelled meanwhile)."""
        await self._transition(job_id, ("running",), state, outcome)

    async def cancel(self, job_id: str) -> State:
        """queued or running -> cancelled; returns the state before. To cancel again changes nothing. Raises NotFound, or Conflict where it has ended."""
        before = (await self.get(job_id)).state
        if before == "cancelled":
            return before
        await self._transition(job_id, ("queued", "running"), "cancelled", None)
        return before

    async def requeue(self, job_id: str) -> None:
        """running -> queued, not counted as an attempt: the server is shutting down."""

        def requeue(connection: sqlite3.Connection) -> None:
            with connection:
                connection.execute("UPDATE jobs SET state = 'queued', attempts = attempts - 1, started = NULL WHERE id = ? AND state = 'running'", (job_id,))

        await self._do(requeue)

    async def recover(self) -> list[str]:
        """What was running when the last server ended: queued again, or failed after too many attempts, whose ids are returned."""

        def recover(connection: sqlite3.Connection) -> list[str]:
            problem = {
                "status": 500,
                "code": "internal",
                "title": "Internal error",
                "detail": "The server ended twice while this calibration ran; its memory may be too small for it.",
            }
            with connection:
                given_up = connection.execute(
                    "UPDATE jobs SET state = 'failed', ended = ?, outcome = ? WHERE state = 'running' AND attempts >= ? RETURNING id",
                    (time.time(), json.dumps(problem), MOST_ATTEMPTS),
                ).fetchall()
                connection.execute("UPDATE jobs SET state = 'queued', started = NULL WHERE state = 'running'")
            return [job_id for (job_id,) in given_up]

        return await self._do(recover)

    async def _transition(self, job_id: str, allowed: tuple[State, ...], state: State, outcome: dict[str, Any] | None) -> None:
        def transition(connection: sqlite3.Connection) -> None:
            marks = ", ".join("?" * len(allowed))
            with connection:
                done = connection.execute(
                    f"UPDATE jobs SET state = ?, ended = ?, outcome = ? WHERE id = ? AND state IN ({marks})",  # noqa: S608 - marks are question marks
                    (state, time.time(), None if outcome is None else json.dumps(outcome), job_id, *allowed),
                )
                if done.rowcount == 0:
                    raise Conflict("The calibration has already ended.")

        await self._do(transition)

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        def run() -> T:
            try:
                with storage_errors():
                    if self._connection is None:
                        self._connection = _connect(self._path)
                    done = work(self._connection)
            except sqlite3.Error as error:
                self._disconnect()
                self._note(error)
                raise JobsUnavailable from error
            self._note(None)
            return done

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, run)
        except JobsUnavailable:
            self.changed.set()  # whoever waits for a job now tries until the database can be used again
            raise

    def _note(self, error: sqlite3.Error | None) -> None:
        """Log what is wrong with the database when that changes, not with every call."""
        trouble = None if error is None else str(error)
        if trouble == self._trouble:
            return
        self._trouble = trouble
        if error is None:
            log.info("jobs_available", file=str(self._path))
        else:
            log.error("jobs_unavailable", file=str(self._path), reason=trouble, remedy=_remedy(error))

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _connect(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.Error where the file is damaged or cannot be written, before anything in it is changed."""
    if _size(path) == 0 and _size(path.with_name(path.name + "-wal")) > 0:  # SQLite would begin a new one, and delete what is left of the old
        raise _Damaged("the file is empty or gone, but not its -wal")
    connection = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level=None)
    try:
        connection.row_factory = sqlite3.Row
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise _Damaged(found)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.executescript(_SCHEMA)
        connection.execute("BEGIN IMMEDIATE")  # to read, another's lock would not be in the way
        connection.execute("ROLLBACK")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _size(path: Path) -> int:
    with suppress(OSError):
        return os.path.getsize(path)
    return 0


def _remedy(error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # what lies above that byte says more precisely what happened
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return "Another process has it locked. This server goes on with the jobs by itself when that has ended."
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return (
            "It is damaged; nothing in it was changed. Move it away, and with it what has its name and ends in -wal or -shm; a sound copy may take its place. "
            "This server goes on with the jobs by itself then."
        )
    return "See that this server can read and write the file and its folder, and that there is space. It goes on with the jobs by itself then."


def _job(row: sqlite3.Row) -> Job:
    outcome = None if row["outcome"] is None else json.loads(row["outcome"])
    return Job(row["id"], row["state"], json.loads(row["config"]), row["created"], row["started"], row["ended"], row["attempts"], outcome)
