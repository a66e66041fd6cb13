"""How far a calibration is: stages in order, a fraction of the whole, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

# What each stage takes, about, on the example, in parts of what the stages without canaries take; the estimate of the time left corrects itself as stages end.
STAGES: dict[str, float] = {
    "read": 0.05,
    "preprocessing": 0.1,
    "canaries": 2.0,
    "expert": 0.2,
    "auxiliary": 0.5,
    "threshold": 0.05,
    "report": 0.09,
    "publish": 0.01,
}


@dataclass(frozen=True)
class Progress:
    """stage: one of STAGES; fraction: of the whole calibration, 0 to 1; eta_seconds: None until something can be said."""

    stage: str
    fraction: float
    eta_seconds: float | None


class Tracker:
    """Turns what stages say of themselves into Progress events; remembers how long each took. `left_out`: stages that will not come."""

    def __init__(self, emit: Callable[[Progress], None], left_out: Sequence[str] = (), clock: Callable[[], float] = time.monotonic) -> None:
        self._emit, self._clock = emit, clock
        whole = sum(share for name, share in STAGES.items() if name not in left_out)
        self._shares = {name: share / whole for name, share in STAGES.items()}
        self._started = clock()
        self._done = 0.0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[float], None]]:
        """Run a stage; yields a function that takes the stage's own fraction."""
        began, furthest = self._clock(), 0.0

        def report(fraction: float) -> None:
            nonlocal furthest
            furthest = max(furthest, fraction)  # a training that is begun again at a colder rate takes nothing back
            whole = min(self._done + self._shares[name] * furthest, 1.0)
            elapsed = self._clock() - self._started
            self._emit(Progress(name, round(whole, 4), round(elapsed / whole - elapsed, 1) if whole > 0.02 else None))

        report(0.0)
        yield report
        self._done += self._shares[name]
        self.seconds[name] = round(self._clock() - began, 3)
        report_end = Progress(name, round(min(self._done, 1.0), 4), None)
        if name == list(STAGES)[-1]:
            self._emit(report_end)
