"""A device in virtual time, for tests of the batcher: it notes what it gets, fails on request, and breaks the test where a promise is broken."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.batcher import Batcher
from service.caller import Caller


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while anything can run, and then jumps to the next timer. Nothing ever sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self.now


class _Jump(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everything waits, and no timer is set: a deadlock")
            self._loop.now += max(timeout, 0.0)
        return ready


def in_virtual_time(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """The test as one that pytest can call."""

    def run() -> None:
        with asyncio.Runner(loop_factory=VirtualLoop) as runner:
            runner.run(test())

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


@dataclass(eq=False)
class Item:
    """What a test submits: its key and deadline are here to be held against what the device gets."""

    name: str
    key: str = "bundle"
    deadline: float = 1e9
    bad: bool = False


class BrokenPromise(BaseException):
    """Not an Exception: those the batcher rightly takes for failures of the device. This one ends it, and `drain` raises it."""


@dataclass
class Device:
    """Takes `seconds` a batch, and `slots` batches at once; fails on bad items, on batches larger than `fits`, on the next `broken` batches, and once lost."""

    seconds: float = 1.0
    fits: int = 10**9
    broken: int = 0
    most: int = 10**9
    slots: int = 1
    lost: bool = False
    probes: int = 0
    known_lost: bool = False
    batches: list[list[str]] = field(default_factory=list)
    seen: set[Item] = field(default_factory=set)
    failed_alone: set[Item] = field(default_factory=set)
    running: int = 0

    async def run(self, key: str, items: Sequence[Item]) -> list[str]:
        now = asyncio.get_running_loop().time()
        promises = {
            "no batch for a device that is known to be lost": not self.known_lost,
            "no more batches at a time than there are slots": self.running < self.slots,
            "no batch larger than the cap": 0 < len(items) <= self.most,
            "one key a batch": {item.key for item in items} == {key},
            "no expired row on the device": all(item.deadline > now for item in items),
        }
        if broken := [promise for promise, kept in promises.items() if not kept]:
            raise BrokenPromise(broken)
        self.batches.append([item.name for item in items])
        self.seen.update(items)
        self.running += 1
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.running -= 1
        self.broken -= 1
        if self.lost or self.broken >= 0 or len(items) > self.fits or any(item.bad for item in items):
            if len(items) == 1:
                self.failed_alone.update(items)
            raise RuntimeError("the device failed")
        return [f"{item.name} judged" for item in items]

    async def probe(self) -> None:
        if self.known_lost:
            raise BrokenPromise("a device that is known to be lost was probed again")
        self.probes += 1
        self.known_lost = self.lost
        if self.lost:
            raise RuntimeError("the device is lost")


def start(device: Device, capacity: int = 100, max_batch: int = 100, **options: Any) -> Batcher[str, Item, str]:
    given: dict[str, Any] = {"most": lambda _: max_batch, **options}
    batcher: Batcher[str, Item, str] = Batcher(device.run, capacity=capacity, slots=device.slots, probe=device.probe, **given)
    return batcher


def submit(batcher: Batcher[str, Item, str], item: Item, caller: Caller | None = None) -> asyncio.Task[str]:
    return asyncio.create_task(batcher.submit(item.key, item, item.deadline, caller))


def clock() -> float:
    return asyncio.get_running_loop().time()
