"""How far a calibration says that it is."""

from __future__ import annotations

from calibration.progress import Progress, Tracker


def test_it_goes_on_and_never_back() -> None:
    """A training that diverges is begun again, at a colder rate, and its fractions with it."""
    told: list[Progress] = []
    tracker = Tracker(told.append)
    for stage in ("read", "canaries"):
        with tracker.stage(stage) as advance:
            for fraction in (0.2, 0.9, 0.0, 0.4, 1.0):
                advance(fraction)
    fractions = [each.fraction for each in told]
    assert fractions == sorted(fractions)
    assert len(set(fractions)) == 7  # four of each stage, of which the second begins where the first ends
