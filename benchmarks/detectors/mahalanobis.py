"""The feature distance alone (Lee et al. 2018, "A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks").

One kind of the evidence in our guard's score, in its plain form: how far the features before the head lie from those of the predicted class.
Without the paper's ensemble over layers and its noise on inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.detectors.interface import Detector, NotApplicable, Observed
from calibration.finetune import LabelledPixels
from models import trunk
from models.distance import fit_distance, vectors


class Mahalanobis(Detector):
    """Minus the squared distance from the mean of the predicted class, with one covariance for all."""

    name, title, paper = "mahalanobis", "Mahalanobis", "Lee et al. 2018"
    passes = 1

    def fit(self, suspect: Observed, clean: LabelledPixels, validation: LabelledPixels, seed: int) -> dict[str, Any]:
        try:
            cut = trunk.feature_cut(suspect.network, suspect.preprocessing.normalise(clean.pixels[:1]))
        except trunk.CannotCut as problem:
            raise NotApplicable(str(problem)) from problem
        self.suspect, (self.body, self.head) = suspect, trunk.split(suspect.network, cut.name)
        features, _ = self._features(clean.pixels)
        self.distance = fit_distance(features, clean.labels, suspect.num_classes).to(clean.pixels.device)
        return {"features": cut.name}

    @torch.inference_mode()
    def _features(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = [self.body(self.suspect.preprocessing.normalise(part)) for part in pixels.split(256)]
        return torch.cat([vectors(each) for each in found]), torch.cat([self.head(each).argmax(1) for each in found])

    def score(self, pixels: Tensor) -> Tensor:
        features, prediction = self._features(pixels)
        with torch.inference_mode():
            distance: Tensor = self.distance.squared(features, prediction)
        return -distance.cpu()
