"""Owns the queue in front of the device: bounded, work-conserving, deadline-aware.

A request is a row. The moment the device has room, the rows that wait for one bundle go to it together, oldest first; there is no waiting window. A CPU
has room for several batches of a small network at once, a GPU for one: a batch takes a share of the device's slots.
A timeout, a disconnect or a late result is one and the same harmless case: a row whose future is already done. Rows that nobody waits for any
more never reach the device. A batch that fails is halved until the rows that cannot be judged are alone, so that no row fails for its neighbour.

A device may be lost: it fails on everything after an error, or a batch never comes back from it. Then nothing goes to it any more, and all that was admitted
is answered. To end the process, which alone brings the device back, is for those who watch.

Time is the event loop's own monotonic clock, and whatever the device answers is awaited: a test can run all of this in virtual time.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Literal, TypeVar

from starlette.requests import ClientDisconnect

from service.caller import Caller
from service.errors import DeadlineExceeded, DeviceFailed, Draining, Overloaded, RequestProblem

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")
WATCH_SECONDS = 0.5  # between two looks at a batch that may not come back


@dataclass(eq=False)
class Row(Generic[Key, Item, Result]):
    """One item on its way through the device. Times are of the event loop's clock."""

    key: Key
    item: Item
    admitted: float
    deadline: float
    answer: asyncio.Future[Result]


Released = Literal["full", "free", "halved"]  # no more fit; the device was free for all that waited; part of a batch that failed
Loss = Literal["failed", "hangs"]  # an error that persists; a batch that does not come back


@dataclass(frozen=True)
class BatchDone:
    """What there is to know of a finished batch: how long its rows waited, how long it ran, and why it was sent as it was."""

    waits: tuple[float, ...]
    seconds: float
    released: Released


@dataclass(eq=False)
class _OnDevice(Generic[Key, Item, Result]):
    """A batch of which a part is on the device, why it was sent as it was, for how many slots, since when, and what is waited for."""

    rows: list[Row[Key, Item, Result]] = field(repr=False)  # asyncio tells of what fails in a callback, and these hold tensors
    released: Released
    share: int
    since: float
    end: asyncio.Future[Any] | None = field(default=None, repr=False)


async def _no_probe() -> None:
    pass


class Batcher(Generic[Key, Item, Result]):
    """`run(key, items)` gets at most `most(key)` items of one key and answers one result each, in order."""

    def __init__(
        self,
        run: Callable[[Key, Sequence[Item]], Awaitable[Sequence[Result]]],
        *,
        capacity: int,
        most: Callable[[Key], int],
        slots: int = 1,
        share: Callable[[Key], int] = lambda _: 1,
        on_batch: Callable[[BatchDone], None] = lambda _: None,
        probe: Callable[[], Awaitable[None]] = _no_probe,
    ) -> None:
        """slots: what the device has; share: how many of them a batch of a key takes; probe: raises where the device is lost; asked when a batch has failed."""
        self._run, self._capacity, self._most, self._share, self._on_batch, self._probe = run, capacity, most, share, on_batch, probe
        self._slots = self._free = slots
        self._rows: deque[Row[Key, Item, Result]] = deque()
        self._looks = False  # whether the queue will be looked at in the next turn of the event loop, at the latest
        self._changed = asyncio.Event()  # a row was answered or given up, or a batch came back
        self._draining, self._admitted = False, 0
        self._running: set[_OnDevice[Key, Item, Result]] = set()
        self._broken: BaseException | None = None  # no failure of the device: raised by `drain`
        self._refusal: type[RequestProblem] | None = None  # of everything, since it was given up
        self._batch_seconds = self._row_seconds = 0.0  # moving averages: of a batch, and of what a row adds to the wait of those behind it

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return len(self._rows)

    @property
    def busy_since(self) -> float | None:
        """When the oldest running batch, or what is left of it where it was halved, went to the device; None while that is idle."""
        return min((batch.since for batch in self._running), default=None)

    @property
    def lost(self) -> bool:
        """Whether the device was given up: nothing is judged any more."""
        return self._refusal is DeviceFailed

    def seconds_ahead(self) -> float:
        """How long a row that came now would wait for the device, as far as the last batches tell."""
        running = 0.0 if self._free else self._batch_seconds
        return running + len(self._rows) * self._row_seconds

    async def drain(self) -> None:
        """Admit nothing more, and finish what was admitted."""
        self._draining = True
        while (self._admitted or self._running) and self._broken is None:
            self._changed.clear()
            await self._changed.wait()
        if self._broken is not None:
            raise self._broken

    def give_up(self, why: type[RequestProblem]) -> None:
        """Answer all that was admitted with this problem, and whatever comes. What is on the device is left to it, and its results are not waited for."""
        self._refusal = self._refusal or why
        for row in [*self._rows, *(row for batch in self._running for row in batch.rows)]:
            if not row.answer.done():
                row.answer.set_exception(why())
        self._rows.clear()
        for batch in self._running:
            if batch.end is not None and batch.end is not asyncio.current_task():
                batch.end.cancel()

    async def watch(self, patience: float) -> Loss:
        """Wait until the device is lost and given up: after an error that persists, or where a batch does not come back for so many seconds."""
        loop, hanging = asyncio.get_running_loop(), 0.0
        while not self.lost and hanging < patience:
            since, began = self.busy_since, loop.time()
            await asyncio.sleep(WATCH_SECONDS)
            same = since is not None and since == self.busy_since
            # Of a look that came late only so much counts: while the whole process was stopped, the device could not be heard.
            hanging = hanging + min(loop.time() - began, 2 * WATCH_SECONDS) if same else 0.0
        found: Loss = "failed" if self.lost else "hangs"
        self.give_up(DeviceFailed)
        return found

    async def submit(self, key: Key, item: Item, deadline: float, caller: Caller | None = None) -> Result:
        """Wait for the item's result. Raises Overloaded or Draining at once, DeadlineExceeded at the deadline, DeviceFailed, ClientDisconnect."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._refusal is not None:
            raise self._refusal
        if self._draining:
            raise Draining
        if deadline <= now:
            raise DeadlineExceeded
        if len(self._rows) >= self._capacity or now + self.seconds_ahead() > deadline:
            raise Overloaded
        if caller is not None and caller.left:
            raise ClientDisconnect
        row: Row[Key, Item, Result] = Row(key, item, now, deadline, loop.create_future())
        self._rows.append(row)
        self._admitted += 1
        self._look()
        expiry, abandon = loop.call_at(deadline, _give_up, row, DeadlineExceeded), partial(_give_up, row, ClientDisconnect)
        if caller is not None:
            caller.watch(abandon)
        try:
            return await row.answer
        except BaseException:
            # Given up: its place is free at once, or who left would keep others out. (Where `remove` finds no such row, its error holds a text of all tensors.)
            if row in self._rows:
                self._rows.remove(row)
                self._look()  # there may be room for those that waited behind it
            raise
        finally:
            self._admitted -= 1
            self._changed.set()
            expiry.cancel()
            if caller is not None:
                caller.unwatch(abandon)
            del row, abandon  # breaks the cycle from the exception over its traceback and this frame to the row, so that the image goes at once

    def _look(self) -> None:
        """Send what there is room for in the next turn of the event loop: what comes in this one goes together."""
        if not self._looks:
            self._looks = True
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        """As much of the queue as there is room for."""
        self._looks = False
        while rows := self._take():
            released: Released = "full" if len(rows) == self._most(rows[0].key) else "free"
            batch = _OnDevice(rows, released, self._share_of(rows[0]), asyncio.get_running_loop().time())
            self._free -= batch.share
            self._running.add(batch)
            batch.end = self._forward(rows)
            batch.end.add_done_callback(partial(self._back, batch))

    def _forward(self, rows: Sequence[Row[Key, Item, Result]]) -> asyncio.Future[Sequence[Result]]:
        try:
            return asyncio.ensure_future(self._run(rows[0].key, [row.item for row in rows]))
        except Exception as error:  # noqa: BLE001 - not even begun, and no different from one that fails later
            failed: asyncio.Future[Sequence[Result]] = asyncio.get_running_loop().create_future()
            failed.set_exception(error.with_traceback(None))  # the traceback would hold this frame, and so the items
            return failed

    def _take(self) -> list[Row[Key, Item, Result]]:
        """The oldest row that is still wanted, and others of its key, where there is room for them; everything else keeps its place."""
        now = asyncio.get_running_loop().time()
        while self._rows and not _wanted(self._rows[0], now):
            self._rows.popleft()
        if not self._rows or self._share_of(self._rows[0]) > self._free:
            return []
        free = self._free // self._share_of(self._rows[0])
        most = min(self._most(self._rows[0].key), math.ceil(len(self._rows) / free))  # no slot is idle while rows wait
        batch = [self._rows.popleft()]
        later: deque[Row[Key, Item, Result]] = deque()
        while self._rows and len(batch) < most:
            row = self._rows.popleft()
            if _wanted(row, now):
                (batch if row.key == batch[0].key else later).append(row)
        self._rows.extendleft(reversed(later))
        return batch

    def _share_of(self, row: Row[Key, Item, Result]) -> int:
        return min(self._slots, self._share(row.key))

    def _back(self, batch: _OnDevice[Key, Item, Result], forward: asyncio.Future[Sequence[Result]]) -> None:
        """A batch came back. The device gets its next one before anybody is answered: in a storm a turn of the event loop takes as long as a forward."""
        now = asyncio.get_running_loop().time()
        if forward.cancelled():
            self._leave(batch)
        elif (results := self._results(batch.rows, forward)) is None and self._broken is None:
            batch.end = asyncio.get_running_loop().create_task(self._mend(batch, batch.rows, batch.released), name="mend a batch")
            batch.end.add_done_callback(partial(self._mended, batch))
        else:
            self._leave(batch)
            if results is not None:
                self._done(batch.rows, batch.since, now, batch.released, results)

    def _results(self, rows: Sequence[Row[Key, Item, Result]], forward: asyncio.Future[Sequence[Result]]) -> list[Result] | None:
        """What came back of these rows; None where they failed: whatever the device raises belongs to them, and an answer that is none."""
        if forward.cancelled():
            return None
        error = forward.exception()  # raised, its traceback would hold this frame, which holds the batch and `forward`, which holds it
        if error is not None and not isinstance(error, Exception):  # no failure of the device: somebody wants this process to end
            self._break(error)
        if error is not None:
            return None
        try:
            results = list(forward.result())
        except TypeError:
            return None
        return results if len(results) == len(rows) else None

    def _mended(self, batch: _OnDevice[Key, Item, Result], mending: asyncio.Future[None]) -> None:
        if not mending.cancelled() and (error := mending.exception()) is not None:
            self._break(error)
        self._leave(batch)

    def _break(self, error: BaseException) -> None:
        """Nothing is judged any more: those who watch end the process."""
        self._broken = self._broken or error
        self.give_up(DeviceFailed)

    def _leave(self, batch: _OnDevice[Key, Item, Result]) -> None:
        batch.end = None  # that of a mending which was cancelled holds its frame, and so the batch
        self._running.remove(batch)
        self._free += batch.share
        self._changed.set()
        self._send()

    def _done(self, rows: Sequence[Row[Key, Item, Result]], began: float, ended: float, released: Released, results: Sequence[Result] | None) -> None:
        """Answer the rows of a batch that was on the device from then to then; results: None where it failed."""
        seconds = ended - began
        each = seconds / len(rows) * self._share_of(rows[0]) / self._slots
        self._batch_seconds = seconds if self._batch_seconds == 0 else 0.8 * self._batch_seconds + 0.2 * seconds
        self._row_seconds = each if self._row_seconds == 0 else 0.8 * self._row_seconds + 0.2 * each
        for index, row in enumerate(rows):
            if row.answer.done():
                continue
            if results is None:
                row.answer.set_exception(DeviceFailed())
            else:
                row.answer.set_result(results[index])
        self._on_batch(BatchDone(tuple(began - row.admitted for row in rows), seconds, released))

    async def _mend(self, batch: _OnDevice[Key, Item, Result], rows: Sequence[Row[Key, Item, Result]], released: Released) -> None:
        """Of rows that failed together, judge each half alone, until those that fail are known."""
        loop = asyncio.get_running_loop()
        if await self._is_lost():
            return
        if len(rows) == 1:
            self._done(rows, batch.since, loop.time(), released, None)
            return
        middle = len(rows) // 2
        for half in (rows[:middle], rows[middle:]):
            wanted = [row for row in half if _wanted(row, loop.time())]
            if not wanted:
                continue
            batch.since, forward = loop.time(), self._forward(wanted)
            await asyncio.wait([forward])
            results = self._results(wanted, forward)
            if results is None:
                await self._mend(batch, wanted, "halved")
            else:
                self._done(wanted, batch.since, loop.time(), "halved", results)

    async def _is_lost(self) -> bool:
        """After a batch has failed: whether everything would. A probe that hangs counts as that batch."""
        if self._refusal is None:
            try:
                await self._probe()
            except Exception:  # noqa: BLE001 - as for a batch: whatever it raises, there is nothing more to be had from the device
                self.give_up(DeviceFailed)
        return self.lost


def _give_up(row: Row[Any, Any, Any], why: type[Exception]) -> None:
    if not row.answer.done():
        row.answer.set_exception(why())


def _wanted(row: Row[Key, Item, Result], now: float) -> bool:
    return not row.answer.done() and row.deadline > now
