"""The batcher in virtual time: what each row may expect, one promise a test."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence

import pytest
from starlette.requests import ClientDisconnect

from service.batcher import BatchDone, Batcher
from service.caller import Caller
from service.errors import DeadlineExceeded, DeviceFailed, Draining, Overloaded
from tests.virtual_device import Device, Item, clock, in_virtual_time, start, submit


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
async def test_the_cap_is_that_of_the_batchs_own_key() -> None:
    device, done = Device(), list[BatchDone]()
    batcher = start(device, most={"slow": 1, "fast": 3}.__getitem__, on_batch=done.append)
    await asyncio.gather(*(submit(batcher, Item(name, key=key)) for name, key in zip("abcdef", ["slow", "fast", "slow", "fast", "fast", "fast"], strict=True)))
    assert device.batches == [["a"], ["b", "d", "e"], ["c"], ["f"]]
    assert [batch.released for batch in done] == ["full", "full", "full", "free"]
    await batcher.drain()


@in_virtual_time
async def test_keys_are_never_mixed_and_none_is_starved() -> None:
    device = Device()
    batcher = start(device, max_batch=2)
    await asyncio.gather(*(submit(batcher, Item(name, key=key)) for name, key in zip("abcdef", "xyxyxx", strict=True)))
    assert device.batches == [["a", "c"], ["b", "d"], ["e", "f"]]
    await batcher.drain()


@in_virtual_time
async def test_what_waits_is_shared_among_the_free_slots_and_none_is_idle() -> None:
    device = Device(slots=2)
    batcher = start(device)
    await asyncio.gather(*(submit(batcher, Item(name)) for name in "abcde"))
    assert (device.batches, clock()) == ([["a", "b", "c"], ["d", "e"]], 1.0)
    tasks = [submit(batcher, Item("x"))]
    await asyncio.sleep(0.5)
    tasks += [submit(batcher, Item(name)) for name in "yz"]  # one slot is taken: both go into the other
    await asyncio.gather(*tasks)
    assert (device.batches[2:], clock()) == ([["x"], ["y", "z"]], 2.5)
    await batcher.drain()


@in_virtual_time
async def test_a_batch_takes_the_slots_that_its_key_needs_and_is_not_overtaken_for_ever() -> None:
    device = Device(slots=2)
    batcher = start(device, share={"small": 1, "large": 2, "huge": 9}.__getitem__)
    first = submit(batcher, Item("a", key="small"))
    await asyncio.sleep(0.5)
    await asyncio.gather(first, *(submit(batcher, Item(name, key=key)) for name, key in (("b", "large"), ("c", "small"), ("d", "huge"))))
    assert (device.batches, clock()) == ([["a"], ["b"], ["c"], ["d"]], 4.0)  # c waits for b, though a slot was free
    await batcher.drain()


@in_virtual_time
async def test_draining_waits_for_all_batches_on_the_device() -> None:
    device = Device(slots=2)
    batcher = start(device)
    tasks = [submit(batcher, Item("a"))]
    await asyncio.sleep(0.5)
    tasks.append(submit(batcher, Item("b")))
    await asyncio.sleep(0.1)
    await batcher.drain()
    assert ([task.result() for task in tasks], clock()) == (["a judged", "b judged"], 1.5)


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
async def test_what_a_caller_wanted_who_leaves_never_reaches_the_device_and_its_place_is_free_at_once() -> None:
    device, caller = Device(seconds=5.0), Caller()
    batcher = start(device)
    running = submit(batcher, Item("running"), caller)
    await asyncio.sleep(0.1)
    waiting, other = [submit(batcher, Item(name), caller) for name in "ab"], submit(batcher, Item("other"), Caller())
    await asyncio.sleep(0.1)
    caller.leave()
    for task in (running, *waiting, submit(batcher, Item("late"), caller)):
        with pytest.raises(ClientDisconnect):
            await task
    assert (clock(), batcher.waiting) == (0.2, 1)
    assert await other == "other judged"
    await batcher.drain()
    assert device.batches == [["running"], ["other"]]


@in_virtual_time
async def test_who_leaves_after_the_answer_changes_nothing() -> None:
    caller, batcher = Caller(), start(Device())
    assert await submit(batcher, Item("a"), caller) == "a judged"
    caller.leave()
    await batcher.drain()


@in_virtual_time
async def test_what_an_expired_row_held_goes_at_once() -> None:
    batcher = start(Device(seconds=5.0))
    running = submit(batcher, Item("running"))
    await asyncio.sleep(0.1)
    item = Item("late", deadline=1.0)
    late, held = submit(batcher, item), weakref.ref(item)
    del item
    gc.disable()  # no collection is to be needed for it
    try:
        with pytest.raises(DeadlineExceeded):
            await late
        del late
        await asyncio.sleep(0.1)  # the loop is still about to tell of it
        assert held() is None
    finally:
        gc.enable()
    await running
    await batcher.drain()


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
    short: list[list[str] | None] = [[], None]

    async def run(key: str, items: Sequence[Item]) -> list[str]:
        return short.pop() if short else ["judged"] * len(items)  # type: ignore[return-value] # None, which is nothing at all

    batcher: Batcher[str, Item, str] = Batcher(run, capacity=10, most=lambda _: 10)
    for name in "ab":
        with pytest.raises(DeviceFailed):
            await batcher.submit("bundle", Item(name), 1e9)
    assert await batcher.submit("bundle", Item("c"), 1e9) == "judged"
    await batcher.drain()


@in_virtual_time
async def test_a_row_for_which_there_is_room_does_not_wait_behind_a_wide_one_that_was_given_up() -> None:
    device = Device(slots=2, seconds=2.0)
    batcher = start(device, share={"narrow": 1, "wide": 2}.__getitem__)
    running = submit(batcher, Item("a", key="narrow"))
    await asyncio.sleep(0.1)
    wide, behind = submit(batcher, Item("b", key="wide", deadline=0.5)), submit(batcher, Item("c", key="narrow"))
    with pytest.raises(DeadlineExceeded):
        await wide
    assert (await behind, clock()) == ("c judged", 2.5)
    await running
    await batcher.drain()


@in_virtual_time
async def test_rows_that_are_given_up_while_their_batch_is_mended_are_kept_by_nothing() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    async def run(key: str, items: Sequence[Item]) -> list[str]:
        raise RuntimeError("the device failed")

    batcher: Batcher[str, Item, str] = Batcher(run, capacity=10, most=lambda _: 10, probe=never)
    items = [Item("a"), Item("b")]
    rows, held = [submit(batcher, item) for item in items], [weakref.ref(item) for item in items]
    del items
    gc.disable()  # no collection is to be needed for it
    try:
        await asyncio.sleep(2.0)
        batcher.give_up(Draining)
        assert [type(found) for found in await asyncio.gather(*rows, return_exceptions=True)] == [Draining, Draining]
        del rows
        await asyncio.sleep(0.1)
        assert [item() for item in held] == [None, None]
    finally:
        gc.enable()
    await batcher.drain()


@in_virtual_time
async def test_a_device_that_cannot_even_begin_fails_its_rows_and_not_the_batcher() -> None:
    full = [True]

    def run(key: str, items: Sequence[Item]) -> asyncio.Future[list[str]]:
        if full[0]:
            raise RuntimeError("no thread is left")
        found: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        found.set_result(["judged"] * len(items))
        return found

    batcher: Batcher[str, Item, str] = Batcher(run, capacity=10, most=lambda _: 10)
    found = await asyncio.gather(submit(batcher, Item("a")), submit(batcher, Item("b")), return_exceptions=True)
    assert [type(each) for each in found] == [DeviceFailed, DeviceFailed]
    full[0] = False
    assert await batcher.submit("bundle", Item("c"), 1e9) == "judged"
    await batcher.drain()


@in_virtual_time
async def test_a_batch_goes_to_the_device_in_the_turn_in_which_the_last_comes_back() -> None:
    """In a storm a turn of the event loop may take as long as a forward, and meanwhile the device would be idle."""
    forwards: list[asyncio.Future[list[str]]] = []

    def run(key: str, items: Sequence[Item]) -> asyncio.Future[list[str]]:
        forwards.append(asyncio.get_running_loop().create_future())
        return forwards[-1]

    batcher: Batcher[str, Item, str] = Batcher(run, capacity=10, most=lambda _: 1)
    tasks = [submit(batcher, Item(name)) for name in "ab"]
    await asyncio.sleep(1.0)
    assert len(forwards) == 1
    forwards[0].set_result(["a judged"])
    await asyncio.sleep(0)
    assert (len(forwards), tasks[0].done()) == (2, False)  # before the first is answered
    forwards[1].set_result(["b judged"])
    assert await asyncio.gather(*tasks) == ["a judged", "b judged"]
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
    assert done == [BatchDone((0.0,), 2.0, "free"), BatchDone((1.5,), 2.0, "free")]
    await batcher.drain()


@in_virtual_time
async def test_a_batch_tells_why_it_was_sent_as_it_was() -> None:
    done: list[BatchDone] = []
    batcher = start(Device(fits=1), max_batch=2, on_batch=done.append)
    await asyncio.gather(*[submit(batcher, Item(name)) for name in "abc"])
    assert [(len(each.waits), each.released) for each in done] == [(1, "halved"), (1, "halved"), (1, "free")]
    await batcher.drain()
    done.clear()
    batcher = start(Device(), max_batch=2, on_batch=done.append)
    await asyncio.gather(*[submit(batcher, Item(name)) for name in "abc"])
    assert [(len(each.waits), each.released) for each in done] == [(2, "full"), (1, "free")]
    await batcher.drain()
