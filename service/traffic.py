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

    A crowd that comes at once is what a queue is for; a queue that stays only makes all of them wait, and what waits takes memory and caches from what runs.
    So an image comes in where it would wait for BURST of what is left of its deadline at most, or for STANDING of it if for as long as its deadline no image
    came that had less than CALM to wait.
    """

    LAST = 32
    BURST, STANDING = 0.5, 0.25  # with more than a half, what is admitted comes too late where the guess is a little low
    CALM = 0.05  # seconds ahead

    def __init__(self, deadline_seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._deadline, self._clock = deadline_seconds, clock
        self._under_way = 0
        self._each: deque[float] = deque(maxlen=self.LAST)
        self._calm = clock()  # when an image last came and had next to nothing before it

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
        share = self.BURST if self._clock() - self._calm < deadline else self.STANDING
        return self.seconds_ahead > share * (deadline - waited)

    @contextmanager
    def judging(self) -> Iterator[None]:
        """Around the judging of one image; where that raises, it says nothing about how long judging takes."""
        began = self._clock()
        if self.seconds_ahead < self.CALM:
            self._calm = began
        self._under_way += 1
        among = self._under_way
        try:
            yield
            self._each.append((self._clock() - began) / among)
        finally:
            self._under_way -= 1
