"""Who is told at once that the service is too busy, and who is not."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from service.traffic import Traffic

HEADERS = [(b"host", b"a"), (b"x-deadline-ms", b"1000")]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def judged(traffic: Traffic, clock: Clock, crowd: int, each: float) -> None:
    """A crowd comes at once, and one after another is judged."""
    with ExitStack() as stack:
        inside = [stack.enter_context(ExitStack()) for _ in range(crowd)]
        for one in inside:
            one.enter_context(traffic.judging())
        for one in inside:
            clock.now += each
            one.close()


def test_the_wait_is_that_of_those_under_way() -> None:
    clock = Clock()
    traffic = Traffic(10.0, clock)
    judged(traffic, clock, 100, 0.002)
    assert traffic.seconds_ahead == 0.0  # nobody is there
    with traffic.judging(), traffic.judging():
        assert traffic.seconds_ahead == pytest.approx(2 * 0.002, rel=0.1)


def test_a_request_is_hopeless_where_half_of_its_deadline_would_be_waited() -> None:
    clock = Clock()
    traffic = Traffic(10.0, clock)
    judged(traffic, clock, 300, 0.01)
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(traffic.judging())
        assert not traffic.hopeless(HEADERS)
        for _ in range(20):
            stack.enter_context(traffic.judging())
        assert traffic.hopeless(HEADERS)
        assert not traffic.hopeless([])  # who waits longer is served
        assert not traffic.hopeless([(b"x-deadline-ms", b"nonsense")])  # is told so elsewhere
        assert traffic.hopeless([(b"x-deadline-ms", b"0")])
    assert not traffic.hopeless(HEADERS)


def test_a_queue_that_stays_is_let_grow_half_as_long_as_one_that_a_crowd_has_made() -> None:
    clock = Clock()
    traffic = Traffic(10.0, clock)
    judged(traffic, clock, 300, 0.01)
    clock.now += 1.0
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(traffic.judging())
        clock.now += 0.9
        assert not traffic.hopeless(HEADERS)
        clock.now += 0.2  # nobody has found the service calm for longer than these callers wait
        assert traffic.hopeless(HEADERS)
        assert not traffic.hopeless([(b"x-deadline-ms", b"2000")])  # for them the crowd has just come
    judged(traffic, clock, 300, 0.01)
    clock.now += 1.0
    with ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(traffic.judging())
        assert not traffic.hopeless(HEADERS)  # the next crowd is one


def test_what_was_here_before_it_was_read_has_waited_already() -> None:
    clock = Clock()
    traffic = Traffic(10.0, clock)
    judged(traffic, clock, 300, 0.01)
    with ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(traffic.judging())
        assert not traffic.hopeless(HEADERS, waited=0.2)
        assert traffic.hopeless(HEADERS, waited=0.6)
        assert not traffic.hopeless([], waited=0.6)
    assert not traffic.hopeless(HEADERS, waited=0.9)  # nobody is before it
    assert traffic.hopeless(HEADERS, waited=1.1)


def test_what_fails_teaches_nothing_and_leaves_nothing_behind() -> None:
    clock = Clock()
    traffic = Traffic(1.0, clock)

    def fail() -> None:
        with traffic.judging():
            clock.now += 9.0
            raise OSError

    for _ in range(100):
        with pytest.raises(OSError):  # noqa: PT011 - ours, whatever it says
            fail()
    assert (traffic.seconds_ahead, traffic.hopeless(HEADERS)) == (0.0, False)


def test_a_few_slow_images_keep_nobody_out() -> None:
    clock = Clock()
    traffic = Traffic(1.0, clock)
    judged(traffic, clock, 1, 0.001)
    for _ in range(20):
        judged(traffic, clock, 1, 5.0)
    with traffic.judging():
        assert traffic.seconds_ahead == pytest.approx(0.001)
