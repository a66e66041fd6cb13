"""The deadline for what a connection has to send."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl


class ReceiveClock(FlowControl):
    """uvicorn's flow control with a deadline that runs only while the peer may send: a pause of ours is never held against it."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, expired: Callable[[], None]) -> None:
        super().__init__(transport)
        self._loop, self._expired = loop, expired
        self.left: float | None = None  # seconds, when it ran last
        self.reading_since = float("-inf")
        self._deadline: float | None = None
        self._handle: asyncio.TimerHandle | None = None  # of the last look that was asked for: it may find that there is nothing to do, or not yet

    @property
    def deadline(self) -> float | None:
        """While it runs."""
        return self._deadline

    def set(self, seconds: float | None) -> None:
        """Run from now on for so long, or not at all."""
        self._deadline, self.left = None, seconds
        self._run()

    def hold(self) -> None:
        """Stop where it is, until the peer may send again."""
        if self._deadline is not None:
            self.left, self._deadline = self._deadline - self._loop.time(), None

    def close(self) -> None:
        """For good: nothing of the connection is kept any more."""
        self.set(None)
        self._expired = lambda: None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _run(self) -> None:
        if self.left is not None and self._deadline is None and not self.read_paused:
            self._deadline = self._loop.time() + self.left
            if self._handle is None or self._handle.when() > self._deadline:
                self._look_at(self._deadline)

    def _look_at(self, when: float) -> None:
        """A message moves its deadline several times, and a timer for each would cost more than what they are for."""
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._loop.call_at(when, self._look)

    def _look(self) -> None:
        self._handle = None
        if self._deadline is None:
            return
        if self._loop.time() < self._deadline:
            self._look_at(self._deadline)
        else:
            self._deadline = self.left = None
            self._expired()

    def pause_reading(self) -> None:
        super().pause_reading()
        self.hold()

    def resume_reading(self) -> None:  # uvicorn calls this whenever the application asks for more of the body
        if self.read_paused:
            self.reading_since = self._loop.time()
        super().resume_reading()
        self._run()
