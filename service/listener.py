"""The listening socket. Connections wait for it in the kernel, first come, first served; it keeps that queue short while those that leave it are late.

A long queue takes up a crowd that arrives at once. Where more connect than the server can turn to, it does harm: each waits until its caller has given up,
the server spends its time on those who have left, and they come again. Nothing but the end of the storm would end that. A short queue fills, the kernel drops
what does not fit at no cost to the server, and whoever gets in is still there.

Connections leave some of the descriptors that this process may have to all else, and wait in the kernel while no more of them are free.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from typing import NoReturn

import structlog

from service import tcp

LONG, SHORT = 2048, 128  # connections that may wait
AT_ONCE = 128  # of them that are accepted before the event loop turns to something else
LATE_SECONDS = 0.1  # a connection that waited this long was late
CALM_SECONDS = 1.0  # with the first that is accepted when nobody was late for this long, the queue is long again
LEFT = 64  # descriptors that connections leave to files, the job database and calibrations; a quarter, where a process may have few
PAUSE_SECONDS = 0.5  # asyncio leaves the listener alone for a second once it has seen Full
TELL_SECONDS = 60.0  # between two lines of the log about it
log = structlog.get_logger()


class Full(OSError):
    """No descriptor is left for another connection."""

    def __init__(self) -> None:
        super().__init__(errno.EMFILE, "No descriptor is left for another connection")


def most_descriptors() -> int:
    """The lowest that is not for connections. The kernel always gives the lowest that is free, so its number tells how many are in use."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit - min(LEFT, limit // 4)


class Listener(socket.socket):
    """Bound to host and port."""

    def __init__(self, host: str, port: int, on_abandoned: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic) -> None:
        """on_abandoned: called for each connection that is passed over. Raises OSError where the address cannot be had."""
        self.on_full: Callable[[], None] = lambda: None  # called once a second while there are no descriptors; may close connections
        self.most = most_descriptors()
        self._careful, self._paused_until, self._told = False, float("-inf"), float("-inf")
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
        """The next caller, but not one that was late and has left. Raises BlockingIOError where none waits, and Full, at most once in a pause."""
        if self._careful:  # it was full once: each time it is looked first whether a descriptor is free, a microsecond
            self._check()
        while True:
            try:
                connection, address = super().accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause()
                raise
            self._careful = self._careful or connection.fileno() >= self.most
            caller = tcp.known(connection)
            self._adapt(caller.since_sent)
            if caller.open or caller.since_sent < LATE_SECONDS:  # one that ends its side at once may still read what is answered at once
                return connection, address
            connection.close()
            self._on_abandoned()

    def _check(self) -> None:
        """Up to Python 3.11, asyncio asks on in the same turn when it has seen Full, and would set a timer, and log a trace, for each."""
        if self._clock() < self._paused_until:
            raise BlockingIOError
        try:
            lowest = os.dup(self.fileno())
        except OSError:
            self._pause()
        os.close(lowest)
        if lowest >= self.most:
            self._pause()

    def _pause(self) -> NoReturn:
        now = self._clock()
        self._careful, self._paused_until = True, now + PAUSE_SECONDS
        if now >= self._told + TELL_SECONDS:
            self._told = now
            log.warning(
                "no_descriptors",
                detail="As many connections are open as this process may have, and others wait. Let it have more descriptors (LimitNOFILE= of systemd, "
                "--ulimit nofile= of Docker), or find out who opens so many.",
            )
        self.on_full()
        raise Full

    def _adapt(self, waited: float) -> None:
        now = self._clock()
        if waited >= LATE_SECONDS:
            self._late = now
        length = SHORT if now - self._late < CALM_SECONDS else LONG
        if length != self._length:
            self._length = length
            self.listen()
