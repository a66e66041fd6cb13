"""A batcher whose device fails on everything, or does not come back: all are answered, and who watches hears of it. In virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from service.batcher import WATCH_SECONDS, Batcher
from service.errors import DeadlineExceeded, DeviceFailed, Draining
from tests.virtual_device import Device, Item, VirtualLoop, clock, in_virtual_time, start, submit


@in_virtual_time
async def test_x11_after_an_error_that_persists_all_are_answered_and_nothing_goes_to_the_device_any_more() -> None:
    device = Device(lost=True)
    batcher = start(device, max_batch=4)
    tasks = [submit(batcher, Item(name)) for name in "abcdef"]
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in found] == [DeviceFailed] * 6
    assert (device.batches, device.probes, clock()) == ([["a", "b", "c", "d"]], 1, 1.0)  # not halved, and those in the queue wait no longer either
    with pytest.raises(DeviceFailed):
        await batcher.submit("bundle", Item("next"), 1e9)
    assert (batcher.lost, batcher.waiting, clock()) == (True, 0, 1.0)
    await batcher.drain()


@in_virtual_time
async def test_x11_what_is_on_the_device_beside_a_batch_that_finds_it_lost_is_answered_too() -> None:
    device = Device(slots=2)
    batcher = start(device)
    first = submit(batcher, Item("a"))
    await asyncio.sleep(0.5)
    second = submit(batcher, Item("b"))
    device.lost = True
    assert [type(result) for result in await asyncio.gather(first, second, return_exceptions=True)] == [DeviceFailed] * 2
    assert clock() == 1.0
    await batcher.drain()
    assert batcher.busy_since is None


@in_virtual_time
async def test_x9_a_device_that_fails_on_some_and_answers_a_probe_is_not_lost() -> None:
    device = Device(fits=2)
    batcher = start(device)
    watch = asyncio.create_task(batcher.watch(20.0))
    found = await asyncio.gather(*(submit(batcher, Item(name, bad=name == "a")) for name in "abcd"), return_exceptions=True)
    assert [isinstance(result, DeviceFailed) for result in found] == [True, False, False, False]
    assert device.probes == 3  # after abcd, ab and a
    await asyncio.sleep(100)
    assert not (batcher.lost or watch.done())
    watch.cancel()
    await batcher.drain()


@in_virtual_time
async def test_x11_who_watches_hears_of_a_lost_device_at_once() -> None:
    batcher = start(Device(lost=True))
    watch = asyncio.create_task(batcher.watch(20.0))
    with pytest.raises(DeviceFailed):
        await submit(batcher, Item("a"))
    assert await watch == "failed"
    assert clock() <= 1.0 + WATCH_SECONDS
    await batcher.drain()


@in_virtual_time
async def test_x14_a_batch_that_does_not_come_back_is_given_up_and_all_are_answered() -> None:
    device = Device(seconds=1e9)
    batcher = start(device)
    watch = asyncio.create_task(batcher.watch(20.0))
    in_time, patient = submit(batcher, Item("in time", deadline=10.0)), submit(batcher, Item("patient"))
    await asyncio.sleep(1.0)
    queued = submit(batcher, Item("queued"))
    with pytest.raises(DeadlineExceeded):
        await in_time
    assert clock() == 10.0
    assert await watch == "hangs"
    assert 20.0 <= clock() <= 20.0 + 2 * WATCH_SECONDS
    assert [type(result) for result in await asyncio.gather(patient, queued, return_exceptions=True)] == [DeviceFailed] * 2
    assert device.batches == [["in time", "patient"]]
    await batcher.drain()


@in_virtual_time
async def test_x14_a_probe_that_does_not_come_back_counts_as_its_batch() -> None:
    device, never = Device(lost=True), asyncio.Event()

    async def probe() -> None:
        await never.wait()

    batcher: Batcher[str, Item, str] = Batcher(device.run, capacity=10, most=lambda _: 10, probe=probe)
    row = submit(batcher, Item("a"))
    assert await batcher.watch(20.0) == "hangs"
    assert 20.0 <= clock() <= 20.0 + 2 * WATCH_SECONDS
    with pytest.raises(DeviceFailed):
        await row
    await batcher.drain()


@in_virtual_time
async def test_what_is_no_failure_of_the_device_ends_the_judging_and_those_who_watch_hear_of_it() -> None:
    class Leave(BaseException):
        pass

    async def run(key: str, items: Sequence[Item]) -> list[str]:
        raise Leave

    batcher: Batcher[str, Item, str] = Batcher(run, capacity=10, most=lambda _: 1)
    rows = [submit(batcher, Item(name)) for name in "ab"]
    assert await batcher.watch(20.0) == "failed"
    assert [type(found) for found in await asyncio.gather(*rows, return_exceptions=True)] == [DeviceFailed, DeviceFailed]
    with pytest.raises(DeviceFailed):
        await batcher.submit("bundle", Item("c"), 1e9)
    with pytest.raises(Leave):
        await batcher.drain()


@in_virtual_time
async def test_slow_batches_one_after_another_and_one_that_is_halved_do_not_hang() -> None:
    device = Device(seconds=15.0, fits=1)
    batcher = start(device)
    watch = asyncio.create_task(batcher.watch(20.0))
    for _ in range(3):
        await asyncio.gather(*(submit(batcher, Item(name)) for name in "abcd"))
    assert not watch.done()
    watch.cancel()
    await batcher.drain()


@in_virtual_time
async def test_the_time_for_which_the_whole_process_was_stopped_does_not_count() -> None:
    device = Device(seconds=15.0)
    batcher = start(device)
    watch = asyncio.create_task(batcher.watch(20.0))
    row = submit(batcher, Item("a"))
    await asyncio.sleep(5.0)
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.now += 8.0
    assert await row == "a judged"
    device.seconds = 1e9
    row = submit(batcher, Item("b"))
    await asyncio.sleep(5.0)
    loop.now += 1000.0
    await asyncio.sleep(10.0)
    assert not watch.done()
    assert await watch == "hangs"
    with pytest.raises(DeviceFailed):
        await row
    await batcher.drain()


@in_virtual_time
async def test_p10_what_is_given_up_while_draining_is_answered_and_the_drain_ends_though_the_device_does_not_come_back() -> None:
    batcher = start(Device(seconds=1e9), max_batch=1)
    tasks = [submit(batcher, Item(name)) for name in "ab"]
    await asyncio.sleep(0.1)
    asyncio.get_running_loop().call_later(5.0, batcher.give_up, Draining)
    await batcher.drain()
    assert [type(result) for result in await asyncio.gather(*tasks, return_exceptions=True)] == [Draining] * 2
    assert (clock(), batcher.waiting, batcher.busy_since, batcher.lost) == (5.1, 0, None, False)
