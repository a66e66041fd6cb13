"""Open-loop load: requests are sent when they are due, whether or not earlier ones were answered, and timed from when they were due.

A closed loop waits for the slow server and so hides its queue (the "coordinated omission" of Gil Tene); this one does not.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

CONNECTIONS, GIVE_UP = 2000, 2.0  # as many as a crowd brings: with few, the load would wait for the server after all
_LENGTH = re.compile(rb"content-length: *([0-9]+)", re.IGNORECASE)


@dataclass(frozen=True)
class Seen:
    """What came of a load: seconds of each answer with status 200, and how often each other thing happened."""

    rate: float
    seconds: tuple[float, ...]
    others: Counter[str]

    @property
    def sent(self) -> int:
        return len(self.seconds) + self.others.total()

    def percentile(self, share: float) -> float:
        """Of the answers, in seconds; infinite where there are none."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("inf")

    def within(self, seconds: float) -> int:
        """Answers in time."""
        return sum(each <= seconds for each in self.seconds)


def request(path: str, headers: Mapping[str, str], body: bytes, port: int) -> bytes:
    """The bytes of one POST."""
    lines = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


class _Connection(asyncio.Protocol):
    """One request at a time; as little Python a request as will do, since it shares the cores with the server under test."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[int] | None = None
        self.received = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, data: bytes) -> asyncio.Future[int]:
        """The status of the answer, once all of it is here."""
        assert self.transport is not None
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(data)
        return self.answer

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        length = _LENGTH.search(head)
        complete = len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")  # or in chunks
        if complete and self.answer is not None and not self.answer.done():
            self.answer.set_result(int(head[9:12]))
            self.received = b""

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(exc or ConnectionResetError())


async def load(port: int, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0) -> Seen:
    """Send at `rate` a second, at random times (Poisson), over keep-alive connections; what is not answered after GIVE_UP counts as lost."""
    source = random.Random(seed)  # noqa: S311 - decides when to send, nothing else
    free, waiting = list[_Connection | None]([None] * CONNECTIONS), deque[asyncio.Future[_Connection | None]]()
    taken: list[float] = []
    others: Counter[str] = Counter()
    loop = asyncio.get_running_loop()

    def give_back(connection: _Connection | None) -> None:
        while waiting:
            if not (first := waiting.popleft()).done():
                first.set_result(connection)
                return
        free.append(connection)

    async def one(data: bytes, due: float) -> None:
        connection, held, kept = None, False, False
        try:
            async with asyncio.timeout_at(due + GIVE_UP):
                if free:
                    connection = free.pop()
                else:
                    waiting.append(loop.create_future())
                    connection = await waiting[-1]
                held = True
                if connection is None or connection.transport is None or connection.transport.is_closing():
                    _, connection = await loop.create_connection(_Connection, "127.0.0.1", port)
                status = await connection.ask(data)
            kept = True
            if status == 200:
                taken.append(loop.time() - due)
            else:
                others[str(status)] += 1
        except (TimeoutError, OSError) as error:
            others[type(error).__name__] += 1
            if connection is not None and connection.transport is not None:
                connection.transport.abort()
        finally:
            if held:
                give_back(connection if kept else None)

    tasks = set[asyncio.Task[None]]()
    due = began = loop.time()
    while due < began + seconds:
        due += source.expovariate(rate)
        if (wait := due - loop.time()) > 0:
            await asyncio.sleep(wait)
        task = loop.create_task(one(source.choice(requests), due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    for connection in free:
        if connection is not None and connection.transport is not None:
            connection.transport.abort()
    return Seen(rate, tuple(taken), others)


def knee(port: int, requests: Sequence[bytes], limit: float, seconds: float, start: float) -> Seen:
    """The highest rate of which 99% are answered within `limit` seconds: doubled until they are not, then halved in between.

    What fails is tried once more, since a shared machine may be away for a moment.
    """
    low, high, best = 0.0, float("inf"), Seen(0.0, (), Counter())
    rate = start
    for _ in range(20):
        for _ in range(2):
            seen = asyncio.run(load(port, requests, rate, seconds))
            carried = seen.within(limit) >= 0.99 * seen.sent
            if carried:
                break
            time.sleep(0.5)
        if carried:
            low, best = rate, seen
        else:
            high = rate
        if high < float("inf") and (high - low) / high < 0.06:
            break
        rate = 2 * rate if high == float("inf") else (low + high) / 2
        time.sleep(0.5)  # whatever queue there is drains
    return best
