"""The load: sent when due, timed from when due, against real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from typing import Any

import pytest

from benchmarks.serving import load as load_module
from benchmarks.serving.http import Contender, compared, leading, settled
from benchmarks.serving.load import Seen, load, request


async def served(delay: float, status: int, chunked: bool, rate: float, seconds: float, ends: bool = False) -> tuple[Seen, list[bytes]]:
    """A load on a server that answers one request at a time, `delay` after it came; ends: its connection a moment later, as it says."""
    bodies: list[bytes] = []
    turn, callers = asyncio.Lock(), set[asyncio.Task[None] | None]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.add(asyncio.current_task())
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            length = int(next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split(b":")[1])
            bodies.append(await reader.readexactly(length))
            async with turn:
                await asyncio.sleep(delay)
            body = b"transfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" if chunked else b"content-length: 2\r\n\r\nok"
            writer.write(f"HTTP/1.1 {status} X\r\n".encode() + b"Connection: close\r\n" * ends + body)
            if ends:
                await asyncio.sleep(0.01)
                break
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        seen = await asyncio.to_thread(load, port, [request("/predict", {"X-One": "1"}, b"body", port)], rate, seconds)
    await asyncio.gather(*filter(None, callers))
    return seen, bodies


@pytest.mark.parametrize("chunked", [False, True])
def test_every_request_is_answered_and_timed(chunked: bool) -> None:
    seen, bodies = asyncio.run(served(0.0, 200, chunked, 100, 0.5))
    assert not seen.others
    assert len(seen.seconds) == len(bodies) > 20
    assert set(bodies) == {b"body"}
    assert 0 < seen.percentile(0.5) <= seen.percentile(0.99) < 2


def test_a_queue_shows_in_the_times_since_nothing_waits_for_the_server() -> None:
    seen, _ = asyncio.run(served(0.02, 200, False, 200, 0.5))  # four times what it can do
    assert seen.percentile(0.99) > 0.5
    assert seen.within(0.2) < len(seen.seconds) / 2


def test_what_is_no_answer_is_counted_apart() -> None:
    seen, bodies = asyncio.run(served(0.0, 429, False, 100, 0.3))
    assert seen.others == Counter({"429": len(bodies)})
    assert seen.percentile(0.99) == float("inf")


def test_a_connection_that_the_server_ends_after_its_answer_is_not_used_again() -> None:
    seen, bodies = asyncio.run(served(0.0, 200, False, 100, 0.5, ends=True))
    assert not seen.others
    assert len(seen.seconds) == len(bodies) > 20


def test_a_server_that_is_not_there_ends_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "CONNECTIONS", 2)
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        seen = load(closed.getsockname()[1], [b"anything"], 5000, 0.4)
    assert (seen.seconds, set(seen.others)) == ((), {"ConnectionRefusedError"})
    assert seen.sent > 1000


def run(way: str, knee: float, *, storm_share: float | None = 0.5) -> dict[str, Any]:
    return {"way": way, "knee": knee, "p50_ms": 30.0, "storm_share": storm_share}


def test_ratios_are_of_the_best_peer_in_the_same_round() -> None:
    guard = settled([run("guard", 300.0), run("guard", 500.0), run("guard", 200.0)])
    alone = settled([run("alone", 400.0), run("alone", 500.0), run("alone", 400.0)])
    others = [settled([run("naive", knee)]) for knee in (100.0, 150.0)]
    assert compared([guard, alone, *others]) == {"of_best_naive": 2.0, "of_best_alone": 0.75}
    assert compared([guard]) == {}
    assert compared([guard, settled([run("alone", 0.0)])]) == {}  # a peer that carries nothing is no measure


def test_rounds_are_told_by_their_medians() -> None:
    found = settled([run("guard", 300.0, storm_share=None), run("guard", 500.0, storm_share=0.9), run("guard", 400.0, storm_share=1.0)])
    assert found == {**run("guard", 400.0, storm_share=0.9), "knees": [300.0, 500.0, 400.0]}
    assert settled([run("guard", 0.0, storm_share=None)])["storm_share"] is None


def test_of_each_way_the_best_of_the_first_round_runs_again() -> None:
    one, two, other, guard = (Contender(*each) for each in (("a", "alone", 1), ("a", "alone", 2), ("b", "naive", 1), ("us", "guard", 1)))
    runs = {guard: [run("guard", 1.0)], one: [run("alone", 5.0), run("alone", 0.0)], two: [run("alone", 4.0)], other: [run("naive", 0.0)]}
    assert leading(runs) == [guard, one, other]
