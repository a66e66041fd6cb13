"""Detectors that users would otherwise pick, and our guard with each of its presets, behind one interface."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.detectors.beatrix import Beatrix
from benchmarks.detectors.guard import BadExpertGuard
from benchmarks.detectors.ibd_psc import IbdPsc
from benchmarks.detectors.interface import Detector, NotApplicable, Observed
from benchmarks.detectors.mahalanobis import Mahalanobis
from benchmarks.detectors.max_softmax import MaxSoftmax
from benchmarks.detectors.scale_up import ScaleUp
from benchmarks.detectors.strip import Strip
from benchmarks.detectors.ted import Ted

PRESETS = ("auto", "paper")
OTHERS = (Strip, ScaleUp, IbdPsc, Ted, Beatrix, Mahalanobis, MaxSoftmax)
DETECTORS: dict[str, Callable[[], Detector]] = {
    **{preset: partial(BadExpertGuard, preset) for preset in PRESETS},
    **{detector.name: detector for detector in OTHERS},
}
"""In the order in which the results tables show them."""

TITLES = {**{preset: f"`{preset}`" for preset in PRESETS}, **{detector.name: detector.title for detector in OTHERS}}

__all__ = ["DETECTORS", "OTHERS", "PRESETS", "TITLES", "Detector", "NotApplicable", "Observed"]
