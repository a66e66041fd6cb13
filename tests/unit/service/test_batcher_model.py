"""All promises of the batcher at once, under a machine that tries everything."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from service.batcher import Batcher
from service.errors import DeadlineExceeded, DeviceFailed, Draining, Overloaded
from tests.virtual_device import Device, Item, VirtualLoop, start

CAPACITY, MOST = 6, 4


class Anything(RuleBasedStateMachine):
    """Clients come, wait, leave; the device is slow, fails, is too small, is lost; bundles are swapped; the server drains. The promises hold throughout."""

    slots = 1

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.device = Device(most=MOST, slots=self.slots)
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

    @precondition(lambda self: len(self.rows) > 20)
    @rule()
    def the_device_is_lost(self) -> None:
        self.device.lost = True

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
        queued = [item for item in self.waiting() if item not in self.device.seen]
        assert self.device.running == self.device.slots or not queued

    @invariant()
    def every_answer_is_right_and_in_time(self) -> None:
        for item, at in self.ended.items():
            assert at <= item.deadline + 1e-6
            task = self.rows[item]
            if task.cancelled():
                assert item in self.left
            elif error := task.exception():
                assert isinstance(error, (Overloaded, Draining, DeadlineExceeded, DeviceFailed))
                assert not isinstance(error, DeviceFailed) or item in self.device.failed_alone or self.device.known_lost
                assert not isinstance(error, Overloaded) or item not in self.device.seen
                assert not isinstance(error, Draining) or self.draining
            else:
                assert task.result() == f"{item.name} judged"

    def teardown(self) -> None:
        try:
            self.loop.run_until_complete(self.batcher.drain())
            self.let()
            assert (self.waiting(), self.batcher.waiting, self.batcher.busy_since, self.device.running) == ([], 0, None, 0)
            self.every_answer_is_right_and_in_time()
        finally:
            self.loop.close()


class AnythingOnTwoSlots(Anything):
    slots = 2


@pytest.mark.parametrize("machine", [Anything, AnythingOnTwoSlots])
def test_the_promises_hold_whatever_happens_in_whatever_order(machine: type[Anything]) -> None:
    budget = settings(max_examples=250, stateful_step_count=30, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=budget)
