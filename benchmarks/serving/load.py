"""Open-loop load: requests are sent when they are due, whether or not earlier ones were answered, and timed from when they were due.

A closed loop waits for the slow server and so hides its queue (the "coordinated omission" of Gil Tene); this one does not.
"""

from __future__ import annotations

import random
import re
import selectors
import socket
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONNECTIONS, GIVE_UP = 2000, 2.0  # as many as a crowd brings: with few, the load would wait for the server after all
AT_ONCE, SWEEP = 64, 0.05  # requests that are sent before answers are read; seconds between two looks at what to give up
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
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


@dataclass(eq=False)
class _Connection:
    """One request at a time."""

    socket: socket.socket
    due: float = 0.0  # of the request that it carries
    unsent: bytes = b""
    received: bytes = b""


class _Load:
    """Sends what is due and times what comes back, in one loop over bare sockets: it shares the cores with the server under test, so that what the load costs
    is taken from what the server can do."""

    def __init__(self, port: int) -> None:
        self._address = ("127.0.0.1", port)
        self._selector = selectors.DefaultSelector()
        self._free: list[_Connection] = []
        self._busy: set[_Connection] = set()
        self._waiting: deque[tuple[float, bytes]] = deque()  # requests for which there is no connection
        self.taken: list[float] = []
        self.others: Counter[str] = Counter()

    def run(self, requests: Sequence[bytes], rate: float, seconds: float, source: random.Random) -> None:
        """At random times (Poisson), until all are answered or given up."""
        began = swept = time.perf_counter()
        due = began + source.expovariate(rate)
        while due < began + seconds or self._busy or self._waiting:
            now = time.perf_counter()
            while self._waiting and (self._free or len(self._busy) < CONNECTIONS):
                self._send(*self._waiting.popleft())
            for _ in range(AT_ONCE):
                if due > now or due >= began + seconds:
                    break
                self._send(due, source.choice(requests))
                due += source.expovariate(rate)
            if now - swept > SWEEP:
                swept = now
                self._give_up(now - GIVE_UP)
            for key, events in self._selector.select(max(0.0, min(due - now, SWEEP)) if due < began + seconds else SWEEP):
                self._ready(key.data, events)

    def close(self) -> None:
        for connection in [*self._free, *self._busy]:
            connection.socket.close()
        self._selector.close()

    def _send(self, due: float, data: bytes) -> None:
        if self._free:
            connection = self._free.pop()
        elif len(self._busy) < CONNECTIONS:
            try:
                connection = self._connect()
            except OSError as error:  # this process may have no more of them
                self.others[type(error).__name__] += 1
                return
        else:
            self._waiting.append((due, data))
            return
        connection.due, connection.unsent = due, data
        self._busy.add(connection)
        self._write(connection)

    def _connect(self) -> _Connection:
        made = _Connection(socket.socket())
        made.socket.setblocking(False)
        made.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        made.socket.connect_ex(self._address)  # whether it could, the first attempt to write tells
        self._selector.register(made.socket, selectors.EVENT_READ, made)
        return made

    def _write(self, connection: _Connection) -> None:
        try:
            connection.unsent = connection.unsent[connection.socket.send(connection.unsent) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(connection, type(error).__name__)
            return
        if connection.unsent:
            self._selector.modify(connection.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)

    def _ready(self, connection: _Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._selector.modify(connection.socket, selectors.EVENT_READ, connection)
            self._write(connection)
        elif events & selectors.EVENT_READ:
            try:
                data = connection.socket.recv(65536)
            except BlockingIOError:
                return
            except OSError as error:
                self._lose(connection, type(error).__name__)
                return
            if not data or connection not in self._busy:  # what comes unasked is said before the end
                self._lose(connection, "ConnectionResetError")
                return
            connection.received += data
            status = _status(connection.received)
            if status is not None:
                self._answered(connection, status)

    def _answered(self, connection: _Connection, status: int) -> None:
        if status == 200:
            self.taken.append(time.perf_counter() - connection.due)
        else:
            self.others[str(status)] += 1
        self._busy.remove(connection)
        if connection.unsent or _CLOSE.search(connection.received.partition(b"\r\n\r\n")[0]):
            self._end(connection)
        else:
            connection.received = b""
            self._free.append(connection)

    def _lose(self, connection: _Connection, why: str) -> None:
        """What it carried, if anything, is not answered any more."""
        self._end(connection)
        if connection in self._busy:
            self._busy.remove(connection)
            self.others[why] += 1
        else:
            self._free.remove(connection)

    def _end(self, connection: _Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()

    def _give_up(self, before: float) -> None:
        """What was due before that time."""
        while self._waiting and self._waiting[0][0] < before:
            self._waiting.popleft()
            self.others["TimeoutError"] += 1
        for connection in [each for each in self._busy if each.due < before]:
            self._lose(connection, "TimeoutError")


def _status(received: bytes) -> int | None:
    """Of an answer, once all of it is here."""
    head, found, body = received.partition(b"\r\n\r\n")
    if not found:
        return None
    length = _LENGTH.search(head)
    complete = len(body) >= int(length[1]) if length else body.endswith(b"0\r\n\r\n")  # or in chunks
    return int(head[9:12]) if complete else None


def load(port: int, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0) -> Seen:
    """Send at `rate` a second, at random times (Poisson), over keep-alive connections; what is not answered after GIVE_UP counts as lost."""
    going = _Load(port)
    try:
        going.run(requests, rate, seconds, random.Random(seed))  # noqa: S311 - decides when to send, nothing else
    finally:
        going.close()
    return Seen(rate, tuple(going.taken), going.others)


def knee(port: int, requests: Sequence[bytes], limit: float, seconds: float, start: float) -> Seen:
    """The highest rate of which 99% are answered within `limit` seconds: doubled until they are not, then halved in between.

    What fails is tried once more, since a shared machine may be away for a moment.
    """
    low, high, best = 0.0, float("inf"), Seen(0.0, (), Counter())
    rate = start
    for _ in range(20):
        for _ in range(2):
            seen = load(port, requests, rate, seconds)
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
