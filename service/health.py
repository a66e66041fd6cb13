"""Whether this process should get traffic, and why not."""

from __future__ import annotations

import asyncio

from service.engine import Engine
from service.predict import ImageBatcher

STUCK_SECONDS = 10.0  # a forward that runs longer than this may hang: others are the better choice for new images


class Health:
    """One per server; whoever starts it and drains it says so."""

    def __init__(self, engine: Engine, batcher: ImageBatcher) -> None:
        self._engine, self._batcher = engine, batcher
        self.started = self.draining = False
        self.not_loaded: dict[str, str] = {}  # guards whose active version could not be loaded at the start, and why

    def unavailable(self) -> dict[str, str]:
        """Those of `not_loaded` that were neither activated nor taken out of service since."""
        return {guard: reason for guard, reason in self.not_loaded.items() if guard not in self._engine.decided}

    def not_ready(self) -> str | None:
        """Why images should be sent elsewhere; None where they may come."""
        if not self.started or self.draining:
            return "The server is starting." if not self.started else "The server is shutting down."
        if self._batcher.lost:
            return "The device is lost, and this process is about to end."
        unavailable = self.unavailable()
        if unavailable and not self._engine.all_live():  # with no guard at all, or none that was ever activated, it waits for its first and is ready
            return " ".join(["None of the guards could be loaded.", *(f"{guard}: {reason}" for guard, reason in list(unavailable.items())[:3])])
        busy = self._batcher.busy_since
        if busy is not None and asyncio.get_running_loop().time() - busy > STUCK_SECONDS:
            return "The device has not finished a forward pass in time."
        return None
