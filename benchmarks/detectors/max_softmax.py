"""Confidence alone (Hendrycks and Gimpel 2017, "A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks").

The null baseline: backdoored predictions are unusually sure, so the surest are the most suspicious.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.detectors.interface import Detector, Observed
from calibration.finetune import LabelledPixels


class MaxSoftmax(Detector):
    """Minus the logit of the greatest confidence, which keeps the order of confidences that round to 1."""

    name, title, paper = "max_softmax", "max-softmax", "Hendrycks and Gimpel 2017"
    passes = 1

    def fit(self, suspect: Observed, clean: LabelledPixels, validation: LabelledPixels, seed: int) -> dict[str, Any]:
        self.suspect = suspect
        return {}

    def score(self, pixels: Tensor) -> Tensor:
        logits = self.suspect.logits(pixels).double()
        top = logits.topk(1).indices
        return (logits.scatter(1, top, float("-inf")).logsumexp(1) - logits.gather(1, top)[:, 0]).cpu()
