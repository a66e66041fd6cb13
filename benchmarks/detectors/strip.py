"""STRIP (Gao et al. 2019, "STRIP: A Defence Against Trojan Attacks on Deep Neural Networks").

An image is superimposed with clean ones. A trigger survives that and keeps the prediction, so its entropy stays low; without one the prediction varies.

The authors superimpose 100 images; 32 are what a suite of this size can pay for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.detectors.interface import Detector, Observed
from calibration.finetune import LabelledPixels, generator

OVERLAYS = 32


class Strip(Detector):
    """Mean entropy over overlays, each half image, half clean."""

    name, title, paper = "strip", "STRIP", "Gao et al. 2019"
    passes = 1 + OVERLAYS

    def fit(self, suspect: Observed, clean: LabelledPixels, validation: LabelledPixels, seed: int) -> dict[str, Any]:
        rows = torch.randperm(len(clean), generator=generator(seed, "strip"))[:OVERLAYS]
        self.suspect, self.overlays = suspect, clean.pixels[rows.to(clean.pixels.device)].float()
        return {"overlays": OVERLAYS}

    @torch.inference_mode()
    def score(self, pixels: Tensor) -> Tensor:
        found = []
        for part in pixels.split(64):
            mixed = (part.float()[:, None] + self.overlays) / 2  # [N, K, 3, H, W]
            p = self.suspect.logits(mixed.flatten(0, 1).round().to(torch.uint8)).double().softmax(1)
            found.append(torch.special.entr(p).sum(1).view(len(part), -1).mean(1).cpu())
        return torch.cat(found)
