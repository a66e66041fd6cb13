"""The listening socket. Connections wait for it in the kernel, first come, first served; it keeps that queue short while those that leave it are late.

A long queue takes up a crowd that arrives at once. Where more connect than the server can turn to, it does harm: each waits until its caller has given up,
the server spends its time on those who have left, and they come again. Nothing but the end of the storm would end that. A short queue fills, the kernel drops
what does not fit at no cost to the server, and whoever gets in is still there.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from service import tcp

LONG, SHORT = 2048, 128  # connections that may wait
AT_ONCE = 128  # of them that are accepted before the event loop turns to something else
LATE_SECONDS = 0.1  # a connection that waited this long was late
CALM_SECONDS = 1.0  # with the first that is accepted when nobody was late for this long, the queue is long again


class Listener(socket.socket):
    """Bound to host and port."""

    def __init__(self, host: str, port: int, on_abandoned: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic) -> None:
        """on_abandoned: called for each connection that is passed over. Raises OSError where the address cannot be had."""
        # With the protocol named: asyncio turns Nagle's algorithm off only where it is, and every answer would wait 40 ms for an acknowledgement.
        super().__init__(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._on_abandoned, self._clock = on_abandoned, clock
        self._late, self._length = float("-inf"), LONG
        try:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if self.family == socket.AF_INET6:
                self.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # "::" is for all callers, whatever this system's default
            self.bind((host, port))
        except OSError:
            self.close()
            raise

    def listen(self, _: int = LONG, /) -> None:
        """Begin; the length of the queue is chosen here, whatever the caller wishes."""
        super().listen(self._length)

    def accept(self) -> tuple[socket.socket, object]:
        """The next caller, but not one that was late and has left. Raises BlockingIOError where none waits."""
        while True:
            connection, address = super().accept()
            caller = tcp.known(connection)
            self._adapt(caller.since_sent)
            if caller.open or caller.since_sent < LATE_SECONDS:  # one that ends its side at once may still read what is answered at once
                return connection, address
            connection.close()
            self._on_abandoned()

    def _adapt(self, waited: float) -> None:
        now = self._clock()
        if waited >= LATE_SECONDS:
            self._late = now
        length = SHORT if now - self._late < CALM_SECONDS else LONG
        if length != self._length:
            self._length = length
            self.listen()
