"""Confidence alone (Hendrycks and Gimpel 2017, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks").

The null baseline: backdoored predictions are unusually sure, so the surest are the most suspicious.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.detectors.interface import Detector, Observed
from calibration.finetune import LabelledPixels
from models.score import log_confidence


class MaxSoftmax(Detector):
    """The logarithm of what is left to the other classes, which keeps the order of confidences that round to 1."""

    name, title, paper = "max_softmax", "max-softmax", "Hendrycks and Gimpel 2017"
    passes = 1

    def fit(self, suspect: Observed, clean: LabelledPixels, validation: LabelledPixels, seed: int) -> dict[str, Any]:
        self.suspect = suspect
        return {}

    def score(self, pixels: Tensor) -> Tensor:
        logits = self.suspect.logits(pixels)
        return log_confidence(logits, logits.argmax(1))[1].cpu()
