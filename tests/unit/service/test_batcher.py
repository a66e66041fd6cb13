"""The batcher in virtual time: what each row may expect, one promise a test, and then all of them at once under a machine that tries everything."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from service.batcher import BatchDone, Batcher
from service.errors import DeadlineExceeded, DeviceFailed, Draining, Overloaded


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
    """Takes `seconds` a batch; fails on bad items, on batches larger than `fits`, and on the next `broken` batches."""

    seconds: float = 1.0
    fits: int = 10**9
    broken: int = 0
    most: int = 10**9
    batches: list[list[str]] = field(default_factory=list)
    seen: set[Item] = field(default_factory=set)
    failed_alone: set[Item] = field(default_factory=set)
    busy: bool = False

    async def run(self, key: str, items: Sequence[Item]) -> list[str]:
        now = asyncio.get_running_loop().time()
        promises = {
            "one batch at a time": not self.busy,
            "no batch larger than the cap": 0 < len(items) <= self.most,
            "one key a batch": {item.key for item in items} == {key},
            "no expired row on the device": all(item.deadline > now for item in items),
        }
        if broken := [promise for promise, kept in promises.items() if not kept]:
            raise BrokenPromise(broken)
        self.batches.append([item.name for item in items])
        self.seen.update(items)
        self.busy = True
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.busy = False
        self.broken -= 1
        if self.broken >= 0 or len(items) > self.fits or any(item.bad for item in items):
            if len(items) == 1:
                self.failed_alone.update(items)
            raise RuntimeError("the device failed")
        return [f"{item.name} judged" for item in items]


def start(device: Device, capacity: int = 100, max_batch: int = 100, **options: Any) -> Batcher[str, Item, str]:
    batcher: Batcher[str, Item, str] = Batcher(device.run, capacity=capacity, max_batch=max_batch, **options)
    batcher.start()
    return batcher


def submit(batcher: Batcher[str, Item, str], item: Item) -> asyncio.Task[str]:
    return asyncio.create_task(batcher.submit(item.key, item, item.deadline))


def clock() -> float:
    return asyncio.get_running_loop().time()


@in_virtual_time
async def test_all_that_waits_goes_to_the_device_the_moment_it_is_free() -> None:
    device = Device()
    batcher = start(device)
    tasks = [submit(batcher, Item("a"))]
    await asyncio.sleep(0.5)
    tasks += [submit(batcher, Item(name)) for name in "bcd"]
    assert await asyncio.gather(*tasks) == ["a judged", "b judged", "c judged", "d judged"]
    assert (device.batches, clock()) == ([["a"], ["b", "c", "d"]], 2.0)  # no waiting window before the first, none between the two
    await batcher.drain()


@in_virtual_time
async def test_a_batch_is_no_larger_than_its_cap_and_the_oldest_go_first() -> None:
    device = Device()
    batcher = start(device, max_batch=2)
    await asyncio.gather(*(submit(batcher, Item(name)) for name in "abcde"))
    assert device.batches == [["a", "b"], ["c", "d"], ["e"]]
    await batcher.drain()


@in_virtual_time
async def test_keys_are_never_mixed_and_none_is_starved() -> None:
    device = Device()
    batcher = start(device, max_batch=2)
    await asyncio.gather(*(submit(batcher, Item(name, key=key)) for name, key in zip("abcdef", "xyxyxx", strict=True)))
    assert device.batches == [["a", "c"], ["b", "d"], ["e", "f"]]
    await batcher.drain()


@in_virtual_time
async def test_a_full_queue_refuses_at_once() -> None:
    device = Device()
    batcher = start(device, capacity=2)
    running = submit(batcher, Item("running"))
    await asyncio.sleep(0.1)
    waiting = [submit(batcher, Item(name)) for name in "ab"]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await batcher.submit("bundle", Item("one too many"), 1e9)
    assert clock() == 0.1
    assert await asyncio.gather(running, *waiting) == ["running judged", "a judged", "b judged"]
    await batcher.drain()


@in_virtual_time
async def test_who_could_not_be_judged_in_time_is_refused_at_admission() -> None:
    device = Device(seconds=1.0)
    batcher = start(device, max_batch=1)
    await submit(batcher, Item("the batcher learns how long a batch takes"))
    tasks = [submit(batcher, Item(name)) for name in "abc"]
    await asyncio.sleep(0.1)
    with pytest.raises(Overloaded):
        await batcher.submit("bundle", Item("hopeless"), clock() + 1.5)
    assert await batcher.submit("bundle", Item("patient"), clock() + 10) == "patient judged"
    await asyncio.gather(*tasks)
    await batcher.drain()


@in_virtual_time
async def test_a_deadline_that_passes_in_the_queue_is_answered_at_once_and_never_reaches_the_device() -> None:
    device = Device(seconds=5.0)
    batcher = start(device)
    running = submit(batcher, Item("running"))
    await asyncio.sleep(0.1)
    late = submit(batcher, Item("late", deadline=1.0))
    with pytest.raises(DeadlineExceeded):
        await late
    assert (clock(), batcher.waiting) == (1.0, 0)
    assert await running == "running judged"
    await batcher.drain()
    assert device.batches == [["running"]]


@in_virtual_time
async def test_a_deadline_that_passes_on_the_device_is_answered_at_once() -> None:
    device = Device(seconds=5.0)
    batcher = start(device)
    late, patient = submit(batcher, Item("late", deadline=1.0)), submit(batcher, Item("patient"))
    with pytest.raises(DeadlineExceeded):
        await late
    assert clock() == 1.0
    assert await patient == "patient judged"
    await batcher.drain()


@in_virtual_time
async def test_a_deadline_in_the_past_is_not_admitted() -> None:
    device = Device()
    batcher = start(device)
    with pytest.raises(DeadlineExceeded):
        await batcher.submit("bundle", Item("past"), clock())
    assert batcher.waiting == 0
    await batcher.drain()
    assert device.batches == []


@in_virtual_time
async def test_a_client_that_leaves_the_queue_changes_nothing_for_its_neighbours() -> None:
    device = Device()
    batcher = start(device)
    running = submit(batcher, Item("running"))
    await asyncio.sleep(0.1)
    before, leaving, after = (submit(batcher, Item(name)) for name in ("before", "leaving", "after"))
    await asyncio.sleep(0.1)
    leaving.cancel()
    assert await asyncio.gather(running, before, after) == ["running judged", "before judged", "after judged"]
    assert (device.batches, clock()) == ([["running"], ["before", "after"]], 2.0)
    assert leaving.cancelled()
    await batcher.drain()


@in_virtual_time
async def test_a_client_that_leaves_while_its_batch_runs_changes_nothing_for_its_neighbours() -> None:
    device = Device()
    batcher = start(device)
    leaving, staying = submit(batcher, Item("leaving")), submit(batcher, Item("staying"))
    await asyncio.sleep(0.5)
    leaving.cancel()
    assert await staying == "staying judged"
    assert await batcher.submit("bundle", Item("next"), 1e9) == "next judged"
    await batcher.drain()


@in_virtual_time
async def test_the_place_of_a_client_that_left_is_free_for_another() -> None:
    device = Device()
    batcher = start(device, capacity=1)
    running = submit(batcher, Item("running"))
    await asyncio.sleep(0.1)
    leaving = submit(batcher, Item("leaving"))
    await asyncio.sleep(0.1)
    leaving.cancel()
    await asyncio.sleep(0)
    assert batcher.waiting == 0
    assert await batcher.submit("bundle", Item("next"), 1e9) == "next judged"
    await running
    await batcher.drain()


@in_virtual_time
async def test_of_a_batch_that_fails_only_the_bad_item_fails() -> None:
    device = Device()
    batcher = start(device)
    tasks = [submit(batcher, Item(name, bad=name == "e")) for name in "abcdefgh"]
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(result, DeviceFailed) for result in found] == [name == "e" for name in "abcdefgh"]
    assert [result for result in found if isinstance(result, str)] == [f"{name} judged" for name in "abcdfgh"]
    assert [len(batch) for batch in device.batches] == [8, 4, 4, 2, 1, 1, 2]  # halved, not judged one by one
    assert await batcher.submit("bundle", Item("next"), 1e9) == "next judged"
    await batcher.drain()


@in_virtual_time
async def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    device = Device(fits=2)
    batcher = start(device)
    found = await asyncio.gather(*(submit(batcher, Item(name)) for name in "abcdefgh"))
    assert found == [f"{name} judged" for name in "abcdefgh"]
    await batcher.drain()


@in_virtual_time
async def test_rows_that_expire_while_a_failed_batch_is_halved_do_not_reach_the_device_again() -> None:
    device = Device(seconds=1.0)
    batcher = start(device)
    tasks = [submit(batcher, Item("bad", bad=True)), submit(batcher, Item("late", deadline=1.5))]
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in found] == [DeviceFailed, DeadlineExceeded]
    await batcher.drain()
    assert device.batches == [["bad", "late"], ["bad"]]


@in_virtual_time
async def test_a_device_that_answers_too_little_fails_its_rows_and_not_the_batcher() -> None:
    short = [True]

    async def run(key: str, items: Sequence[Item]) -> list[str]:
        return [] if short[0] else ["judged"] * len(items)

    batcher: Batcher[str, Item, str] = Batcher(run, capacity=10, max_batch=10)
    batcher.start()
    with pytest.raises(DeviceFailed):
        await batcher.submit("bundle", Item("a"), 1e9)
    short[0] = False
    assert await batcher.submit("bundle", Item("b"), 1e9) == "judged"
    await batcher.drain()


@in_virtual_time
async def test_draining_finishes_what_was_admitted_and_admits_no_more() -> None:
    device = Device()
    batcher = start(device, max_batch=1)
    tasks = [submit(batcher, Item(name)) for name in "abc"]
    await asyncio.sleep(0.1)
    draining = asyncio.create_task(batcher.drain())
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await batcher.submit("bundle", Item("too late"), 1e9)
    assert await asyncio.gather(*tasks) == ["a judged", "b judged", "c judged"]
    await draining
    assert (clock(), batcher.waiting, batcher.busy_since) == (3.0, 0, None)
    await batcher.drain()  # again is harmless


@in_virtual_time
async def test_a_finished_batch_tells_how_long_its_rows_waited_and_it_ran() -> None:
    done: list[BatchDone] = []
    batcher = start(Device(seconds=2.0), on_batch=done.append)
    first = submit(batcher, Item("a"))
    await asyncio.sleep(0.5)
    assert batcher.busy_since == 0.0
    await asyncio.gather(first, submit(batcher, Item("b")))
    assert done == [BatchDone((0.0,), 2.0), BatchDone((1.5,), 2.0)]
    await batcher.drain()


CAPACITY, MOST = 6, 4


class Anything(RuleBasedStateMachine):
    """Clients come, wait, leave; the device is slow, fails, is too small; bundles are swapped; the server drains. The promises hold throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.device = Device(most=MOST)
        self.key = "bundle 0"
        self.draining: asyncio.Task[None] | None = None
        self.rows: dict[Item, asyncio.Task[str]] = {}
        self.ended: dict[Item, float] = {}
        self.left: set[Item] = set()

        async def begin() -> Batcher[str, Item, str]:
            return start(self.device, CAPACITY, MOST)

        self.batcher = self.loop.run_until_complete(begin())

    def let(self, seconds: float = 0.0) -> None:
        """Virtual time passes, and whatever can happen at that instant happens."""

        async def wait() -> None:
            await asyncio.sleep(seconds)
            for _ in range(20):
                await asyncio.sleep(0)

        self.loop.run_until_complete(wait())

    @rule(count=st.integers(1, 8), patience=st.floats(0.01, 8.0), bad=st.booleans())
    def clients_come(self, count: int, patience: float, bad: bool) -> None:
        for number in range(count):
            item = Item(f"item {len(self.rows)}", self.key, self.loop.now + patience, bad and number == 0)
            task = self.loop.create_task(self.batcher.submit(item.key, item, item.deadline))
            task.add_done_callback(lambda _, item=item: self.ended.update({item: self.loop.now}))
            self.rows[item] = task
        self.let()

    @precondition(lambda self: self.waiting())
    @rule(choice=st.randoms(use_true_random=False))
    def a_client_leaves(self, choice: Any) -> None:
        item = choice.choice(self.waiting())
        self.left.add(item)
        self.rows[item].cancel()
        self.let()

    @rule(seconds=st.floats(0.001, 5.0))
    def the_device_takes(self, seconds: float) -> None:
        self.device.seconds = seconds

    @rule(fits=st.integers(1, MOST))
    def the_device_fits_no_more_than(self, fits: int) -> None:
        self.device.fits = fits

    @rule(batches=st.integers(0, 3))
    def the_device_fails_for(self, batches: int) -> None:
        self.device.broken = batches

    @rule()
    def the_bundle_is_swapped(self) -> None:
        self.key = f"bundle {int(self.key.split()[1]) + 1}"

    @precondition(lambda self: len(self.rows) > 30)
    @rule()
    def the_server_drains(self) -> None:
        self.draining = self.draining or self.loop.create_task(self.batcher.drain())
        self.let()

    @rule(seconds=st.floats(0.0, 10.0))
    def time_passes(self, seconds: float) -> None:
        self.let(seconds)

    def waiting(self) -> list[Item]:
        return [item for item, task in self.rows.items() if not task.done()]

    @invariant()
    def every_row_is_answered_or_queued_or_on_the_device(self) -> None:
        queued = [item for item in self.waiting() if item not in self.device.seen]
        assert len(queued) == self.batcher.waiting <= CAPACITY

    @invariant()
    def the_device_is_not_idle_while_rows_wait(self) -> None:
        assert self.device.busy or not self.waiting()

    @invariant()
    def every_answer_is_right_and_in_time(self) -> None:
        for item, at in self.ended.items():
            assert at <= item.deadline + 1e-6
            task = self.rows[item]
            if task.cancelled():
                assert item in self.left
            elif error := task.exception():
                assert isinstance(error, (Overloaded, Draining, DeadlineExceeded, DeviceFailed))
                assert not isinstance(error, DeviceFailed) or item in self.device.failed_alone
                assert not isinstance(error, Overloaded) or item not in self.device.seen
                assert not isinstance(error, Draining) or self.draining
            else:
                assert task.result() == f"{item.name} judged"

    def teardown(self) -> None:
        try:
            self.loop.run_until_complete(self.batcher.drain())
            self.let()
            assert (self.waiting(), self.batcher.waiting, self.batcher.busy_since, self.device.busy) == ([], 0, None, False)
            self.every_answer_is_right_and_in_time()
        finally:
            self.loop.close()


def test_the_promises_hold_whatever_happens_in_whatever_order() -> None:
    budget = settings(max_examples=400, stateful_step_count=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(Anything, settings=budget)
