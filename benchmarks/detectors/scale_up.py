"""SCALE-UP (Guo et al. 2023, "SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via Analyzing Scaled Prediction Consistency").

Pixel values are multiplied and clipped. Backdoored predictions survive that more often than clean ones. With clean images at hand, the consistency is
standardised by class (the paper's data-limited setting).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.detectors.interface import Detector, Observed
from calibration.finetune import LabelledPixels

FACTORS = (3, 5, 7, 9, 11)


class ScaleUp(Detector):
    """Minus the share of amplified copies that are still called the same, against what is usual for the class."""

    name, title, paper = "scale_up", "SCALE-UP", "Guo et al. 2023"
    passes = 1 + len(FACTORS)

    def fit(self, suspect: Observed, clean: LabelledPixels, validation: LabelledPixels, seed: int) -> dict[str, Any]:
        self.suspect = suspect
        consistency, prediction = self.consistency(clean.pixels)
        self.mean = torch.full((suspect.num_classes,), consistency.mean().item(), dtype=torch.float64)
        self.std = torch.full((suspect.num_classes,), consistency.std().clamp_min(1e-6).item(), dtype=torch.float64)
        for label in prediction.unique().tolist():
            of_class = consistency[prediction == label]
            if len(of_class) >= 10:  # of fewer neither mean nor spread is known
                self.mean[label], self.std[label] = of_class.mean(), of_class.std().clamp_min(1 / len(FACTORS) / 10)
        return {"factors": list(FACTORS)}

    def consistency(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Share of amplified copies with the same prediction, float64 [N], and that prediction, int64 [N]; on the CPU."""
        prediction = self.suspect.logits(pixels).argmax(1)
        same = [self.suspect.logits((pixels.float() * factor).clamp(max=255).to(torch.uint8)).argmax(1) == prediction for factor in FACTORS]
        return torch.stack(same).double().mean(0).cpu(), prediction.cpu()

    def score(self, pixels: Tensor) -> Tensor:
        consistency, prediction = self.consistency(pixels)
        return -(consistency - self.mean[prediction]) / self.std[prediction]
