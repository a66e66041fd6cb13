"""How busy the service is with judging: what an image that came now would have to wait.

A queue in front of the device sees too little. Under a storm images wait to be decoded and answered as well, and each refusal that first reads and decodes
takes the time of an answer.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

_MILLISECONDS = re.compile(rb"[0-9]{1,18}")


class Traffic:
    """Counts images from when they are here completely, since a slow sender keeps nobody waiting, until they are judged.

    One that took t while n were under way, itself included, says that each takes t / n. The least of the last few is believed: an image that is slow to
    decode must not have others refused.
    """

    LAST = 32
    SHARE = 0.5  # of what is left of its deadline that an image may expect to wait: with more, what is admitted comes too late where the guess is a little low

    def __init__(self, deadline_seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._deadline, self._clock = deadline_seconds, clock
        self._under_way = 0
        self._each: deque[float] = deque(maxlen=self.LAST)

    @property
    def seconds_ahead(self) -> float:
        """What those that are under way will take."""
        return self._under_way * min(self._each, default=0.0)

    def hopeless(self, headers: Iterable[tuple[bytes, bytes]], waited: float = 0.0) -> bool:
        """Whether a request with these headers should be refused at once, since its answer would come too late.

        waited: for how many seconds it was here already, before it was read.
        """
        wanted = next((value for name, value in headers if name == b"x-deadline-ms"), b"")
        deadline = min(self._deadline, int(wanted) / 1000) if _MILLISECONDS.fullmatch(wanted) else self._deadline
        return self.seconds_ahead > self.SHARE * (deadline - waited)

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Around the judging of one image; where that raises, it says nothing about how long judging takes."""
        self._under_way += 1
        among, began = self._under_way, self._clock()
        try:
            yield
            self._each.append((self._clock() - began) / among)
        finally:
            self._under_way -= 1
