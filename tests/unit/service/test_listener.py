"""The queue of connections in the kernel: long while it is calm, short while those that leave it are late; over real sockets, with a clock by hand."""

from __future__ import annotations

import errno
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from structlog.testing import capture_logs

from service.listener import CALM_SECONDS, SHORT, TELL_SECONDS, Full, Listener, most_descriptors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how long a connection waited")
LATE = 0.5
GREETING = b"POST / HTTP/1.1\r\n"


class Scene:
    """A listener, its clock, and whoever calls it."""

    def __init__(self, stack: ExitStack) -> None:
        self.now, self.abandoned = 0.0, 0
        self._stack = stack
        self.listener = stack.enter_context(Listener("127.0.0.1", 0, self._count, lambda: self.now))
        self.listener.listen(1)
        self.listener.setblocking(False)

    def _count(self) -> None:
        self.abandoned += 1

    def call(self) -> socket.socket:
        """A caller that has said something, and knows that it was heard."""
        caller = self._stack.enter_context(socket.create_connection(self.listener.getsockname(), timeout=5))
        caller.sendall(GREETING)
        return caller

    def accept(self) -> socket.socket:
        return self._stack.enter_context(self.listener.accept()[0])

    def waiting(self, callers: int) -> int:
        """Of so many more callers that come at once, how many the kernel lets wait; then none of them does."""
        with ExitStack() as stack:
            calls = []
            for _ in range(callers):
                caller = stack.enter_context(socket.socket())
                caller.setblocking(False)
                caller.connect_ex(self.listener.getsockname())
                calls.append(caller)
            time.sleep(0.3)  # who was dropped tries again after a second
            return sum(1 for caller in calls if connected(caller))

    def drain(self) -> None:
        while True:
            try:
                self.listener.accept()[0].close()
            except BlockingIOError:
                return


def connected(caller: socket.socket) -> bool:
    try:
        caller.getpeername()
    except OSError:
        return False
    return True


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setattr("service.listener.LATE_SECONDS", LATE)  # more than a busy machine takes from one line to the next
    with ExitStack() as stack:
        yield Scene(stack)


def test_who_comes_in_time_is_accepted_and_heard(scene: Scene) -> None:
    caller = scene.call()
    accepted = scene.accept()
    assert accepted.recv(100) == GREETING
    assert accepted.getpeername() == caller.getsockname()
    with pytest.raises(BlockingIOError):
        scene.accept()


def test_who_was_late_and_has_left_is_passed_over(scene: Scene) -> None:
    scene.call().close()
    reset = scene.call()
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    reset.close()
    stays = scene.call()
    time.sleep(1.2 * LATE)
    assert scene.accept().getpeername() == stays.getsockname()
    with pytest.raises(BlockingIOError):
        scene.accept()
    assert scene.abandoned == 2


def test_who_ends_its_side_at_once_is_accepted_since_it_may_still_read(scene: Scene) -> None:
    caller = scene.call()
    caller.shutdown(socket.SHUT_WR)
    accepted = scene.accept()
    assert accepted.recv(100) == GREETING
    accepted.sendall(b"answer")
    assert caller.recv(100) == b"answer"
    assert scene.abandoned == 0


def test_the_queue_is_short_while_callers_are_late_and_long_again_once_none_was_for_a_while(scene: Scene) -> None:
    assert scene.waiting(2 * SHORT) == 2 * SHORT
    scene.drain()
    scene.call()
    time.sleep(1.2 * LATE)
    scene.accept()
    assert SHORT <= scene.waiting(2 * SHORT) <= SHORT + 1  # the kernel lets one more in
    scene.drain()

    scene.now += CALM_SECONDS / 2
    scene.call()
    scene.accept()
    assert SHORT <= scene.waiting(2 * SHORT) <= SHORT + 1
    scene.drain()

    scene.now += CALM_SECONDS
    scene.call()
    scene.accept()
    assert scene.waiting(2 * SHORT) == 2 * SHORT


def test_an_address_in_use_is_an_error_and_leaves_no_socket_open(scene: Scene) -> None:
    with pytest.raises(OSError, match="in use"):
        Listener("127.0.0.1", scene.listener.getsockname()[1])


def test_an_address_of_ipv6_is_listened_on_and_all_of_them_are_those_of_ipv4_too() -> None:
    for host, callers in (("::1", ["::1"]), ("::", ["::1", "127.0.0.1"])):
        try:
            listener = Listener(host, 0)
        except OSError:
            pytest.skip("this machine has no IPv6")
        with listener:
            listener.listen()
            for caller in callers:
                with socket.create_connection((caller, listener.getsockname()[1]), timeout=5):
                    listener.accept()[0].close()


def full(scene: Scene) -> bool:
    """Whether asyncio would be told that no more can be accepted."""
    try:
        scene.accept()
    except Full as problem:
        return problem.errno == errno.EMFILE  # by which asyncio knows it
    return False


def test_x23_connections_leave_descriptors_to_all_else_and_wait_for_each_other(scene: Scene) -> None:
    told: list[float] = []
    scene.listener.on_full = lambda: told.append(scene.now)
    for _ in range(6):
        scene.call()
    accepted = [scene.accept(), scene.accept()]
    scene.listener.most = accepted[-1].fileno() + 1
    with capture_logs() as logs:
        accepted.append(scene.accept())  # the last one, whose number tells
        assert full(scene)
        for _ in range(3):
            with pytest.raises(BlockingIOError):  # the same turn of the loop, in which one telling is enough
                scene.accept()
        scene.now += 1
        assert full(scene)  # nobody has left
        scene.now += 1
        accepted[0].close()
        assert not full(scene)
        scene.now += 1
        assert full(scene)
        scene.now += TELL_SECONDS
        assert full(scene)
    assert told == [0, 1, 3, 3 + TELL_SECONDS]
    assert [entry["event"] for entry in logs] == ["no_descriptors"] * 2  # a line a minute


def test_x23_a_system_without_descriptors_is_told_of_once_in_a_pause(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.call()
    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", lambda _: (_ for _ in ()).throw(OSError(errno.ENFILE, "Too many open files in system")))
        assert full(scene)
        with pytest.raises(BlockingIOError):
            scene.accept()
        scene.now += 1
        assert full(scene)
    scene.now += 1
    scene.accept()


@pytest.mark.parametrize(("limit", "most"), [(1024, 960), (80, 60), (resource.RLIM_INFINITY, sys.maxsize)])
def test_a_share_of_the_descriptors_is_not_for_connections(monkeypatch: pytest.MonkeyPatch, limit: int, most: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert most_descriptors() == most
