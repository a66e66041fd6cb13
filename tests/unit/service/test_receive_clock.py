"""The clock of a connection, in virtual time: when it expires, and that it keeps nothing."""

from __future__ import annotations

import asyncio
import gc
import weakref
from typing import Any, cast

from service.receive_clock import ReceiveClock
from tests.virtual_device import clock as now
from tests.virtual_device import in_virtual_time


class Transport:
    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Connection:
    """Has a clock, as a protocol has, and notes when that expired."""

    def __init__(self) -> None:
        self.expired_at: list[float] = []
        self.clock = ReceiveClock(cast(Any, Transport()), asyncio.get_running_loop(), self.expired)

    def expired(self) -> None:
        self.expired_at.append(now())


@in_virtual_time
async def test_it_expires_once_at_the_deadline_that_was_set_last() -> None:
    connection = Connection()
    connection.clock.set(10)
    await asyncio.sleep(3)
    connection.clock.set(10)  # later than the look that was asked for
    await asyncio.sleep(1)
    connection.clock.set(2)  # and earlier
    await asyncio.sleep(50)
    assert connection.expired_at == [6.0]
    connection.clock.set(5)
    await asyncio.sleep(50)
    assert connection.expired_at == [6.0, 59.0]


@in_virtual_time
async def test_what_is_taken_back_never_expires() -> None:
    connection = Connection()
    connection.clock.set(1)
    connection.clock.set(None)
    await asyncio.sleep(50)
    assert connection.expired_at == []


@in_virtual_time
async def test_a_pause_of_ours_is_not_held_against_the_peer() -> None:
    connection = Connection()
    connection.clock.set(10)
    await asyncio.sleep(4)
    connection.clock.pause_reading()
    await asyncio.sleep(100)
    connection.clock.resume_reading()
    await asyncio.sleep(50)
    assert connection.expired_at == [110.0]


@in_virtual_time
async def test_a_connection_that_is_closed_is_kept_by_nothing() -> None:
    connection = Connection()
    connection.clock.set(10)
    connection.clock.close()
    held = weakref.ref(connection)
    gc.disable()  # no collection is to be needed for it
    try:
        del connection
        assert held() is None
    finally:
        gc.enable()
