"""Open-loop load: requests are sent when they are due, whether or not earlier ones were answered, and timed from when they were due.

A closed loop waits for the slow server and so hides its queue (the "coordinated omission" of Gil Tene); this one does not.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

CONNECTIONS, GIVE_UP = 256, 2.0


@dataclass(frozen=True)
class Seen:
    """What came of a load: seconds of each answer with status 200, and how often each other thing happened."""

    rate: float
    seconds: tuple[float, ...]
    others: Counter[str]

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


async def load(port: int, requests: Sequence[bytes], rate: float, seconds: float, seed: int = 0) -> Seen:
    """Send at `rate` a second, at random times (Poisson), over keep-alive connections; what is not answered after GIVE_UP counts as lost."""
    source = random.Random(seed)  # noqa: S311 - decides when to send, nothing else
    idle = asyncio.LifoQueue[tuple[asyncio.StreamReader, asyncio.StreamWriter] | None]()
    for _ in range(CONNECTIONS):
        idle.put_nowait(None)  # opened when first needed
    taken: list[float] = []
    others: Counter[str] = Counter()

    async def one(data: bytes, due: float) -> None:
        connection = None
        try:
            async with asyncio.timeout_at(due + GIVE_UP):
                connection = await idle.get()
                if connection is None:
                    connection = await asyncio.open_connection("127.0.0.1", port)
                reader, writer = connection
                writer.write(data)
                status = await _answer(reader)
            if status == 200:
                taken.append(asyncio.get_running_loop().time() - due)
            else:
                others[str(status)] += 1
            idle.put_nowait(connection)
        except (TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            others[type(error).__name__] += 1
            if connection is not None:
                connection[1].close()
                idle.put_nowait(None)

    loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
    due = began = loop.time()
    while due < began + seconds:
        due += source.expovariate(rate)
        if (wait := due - loop.time()) > 0:
            await asyncio.sleep(wait)
        task = loop.create_task(one(source.choice(requests), due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    while not idle.empty():
        if (connection := idle.get_nowait()) is not None:
            connection[1].close()
            with suppress(OSError):  # the server may have closed it meanwhile
                await connection[1].wait_closed()
    return Seen(rate, tuple(taken), others)


async def _answer(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), None)
    if length is not None:
        await reader.readexactly(length)
    else:  # chunked
        while (size := int((await reader.readline()).split(b";")[0], 16)) > 0:
            await reader.readexactly(size + 2)
        await reader.readline()
    return int(lines[0].split()[1])


def knee(port: int, requests: Sequence[bytes], limit: float, seconds: float, start: float) -> Seen:
    """The highest rate that is answered whole with a p99 of at most `limit` seconds: doubled until it is not, then halved in between four times."""
    low, high, best = 0.0, float("inf"), Seen(0.0, (), Counter())
    rate = start
    for _ in range(20):
        seen = asyncio.run(load(port, requests, rate, seconds))
        if not seen.others and seen.percentile(0.99) <= limit:
            low, best = rate, seen
        else:
            high = rate
        if high < float("inf") and (high - low) / high < 0.06:
            break
        rate = 2 * rate if high == float("inf") else (low + high) / 2
        time.sleep(0.5)  # whatever queue there is drains
    return best
