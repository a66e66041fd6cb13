"""What the kernel says of a connection, over the loopback."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator

import pytest

from service import tcp

WAIT = 0.2


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A caller, and the server's end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as caller, server.accept()[0] as accepted:
        yield caller, accepted


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_times_run_from_the_last_bytes_of_each_side_read_or_not(pair: tuple[socket.socket, socket.socket]) -> None:
    caller, accepted = pair
    time.sleep(WAIT)
    new = tcp.known(accepted)
    assert new.open
    assert min(new.since_sent, new.since_received) >= WAIT - 0.02  # the kernel counts in ticks
    caller.sendall(b"a")
    asked = tcp.known(accepted)
    assert asked.since_sent >= WAIT - 0.02 > asked.since_received
    time.sleep(WAIT)
    accepted.sendall(b"b")
    answered = tcp.known(accepted)
    assert answered.since_received >= WAIT - 0.02 > answered.since_sent


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
@pytest.mark.parametrize("goodbye", [b"", b"last words"])
def test_a_peer_that_has_ended_its_side_is_known(pair: tuple[socket.socket, socket.socket], goodbye: bytes) -> None:
    caller, accepted = pair
    caller.sendall(goodbye)
    caller.close()
    assert not tcp.known(accepted).open


class Imitated:
    """A connection of a system that knows less."""

    def __init__(self, answer: bytes | OSError) -> None:
        self._answer = answer

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        if isinstance(self._answer, OSError):
            raise self._answer
        return self._answer


@pytest.mark.parametrize("answer", [b"", b"\1" * 32, OSError("not permitted")])
def test_where_the_kernel_does_not_tell_nobody_waits(answer: bytes | OSError) -> None:
    assert tcp.known(Imitated(answer)) == (True, 0.0, 0.0)


def test_elsewhere_nobody_waits(pair: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tcp.known(pair[1]) == (True, 0.0, 0.0)
