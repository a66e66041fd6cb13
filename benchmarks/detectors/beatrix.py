"""Beatrix (Ma et al. 2023, "The Beatrix Resurrections: Robust Backdoor Detection via Gram Matrices").

Correlations between the channels of the last feature map, and of its powers, are compared with those of clean images of the predicted class: how far they lie
outside the range around the median, in units of the median absolute deviation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.detectors.interface import Detector, Observed
from benchmarks.detectors.layers import Layers
from calibration.finetune import LabelledPixels

ORDERS, RANGE, MOST_CHANNELS = (1, 2, 3, 4), 10.0, 128


class Beatrix(Detector):
    """Minus the mean excess of the Gram matrices' entries over their class's range."""

    name, title, paper = "beatrix", "Beatrix", "Ma et al. 2023"
    passes = 1

    def fit(self, suspect: Observed, clean: LabelledPixels, validation: LabelledPixels, seed: int) -> dict[str, Any]:
        self.layers = Layers(suspect, clean.pixels[:1], last_map=True)
        grams, prediction = self.grams(clean.pixels)
        self.median, self.deviation = (torch.empty(suspect.num_classes, grams.shape[1]) for _ in range(2))
        for label in range(suspect.num_classes):
            of_class = grams[prediction == label] if int((prediction == label).sum()) >= 5 else grams
            self.median[label] = of_class.median(0).values
            self.deviation[label] = (of_class - self.median[label]).abs().median(0).values
        self.deviation.clamp_min_(1e-3 * self.deviation.mean().item() + 1e-12)
        return {"orders": list(ORDERS), "entries": grams.shape[1]}

    def grams(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The upper halves of the Gram matrices of all orders, float32 [N, E], and the predictions, int64 [N]; on the CPU."""
        found, predictions = [], []
        for layers, prediction in self.layers(pixels):
            value = layers[0].float()
            maps = value.flatten(2) if value.ndim == 4 else value.mT  # [n, C, positions]
            maps = maps[:, :MOST_CHANNELS]
            upper = torch.triu_indices(maps.shape[1], maps.shape[1], device=maps.device)
            orders = []
            for order in ORDERS:
                powers = maps.pow(order)
                gram = powers @ powers.mT
                orders.append((gram.sign() * gram.abs().pow(1 / order))[:, upper[0], upper[1]])
            found.append(torch.cat(orders, 1).cpu())
            predictions.append(prediction.cpu())
        return torch.cat(found), torch.cat(predictions)

    def score(self, pixels: Tensor) -> Tensor:
        scores = []
        for part in pixels.split(256):
            grams, prediction = self.grams(part)
            off = (grams - self.median[prediction]).abs() / self.deviation[prediction]
            scores.append(-(off - RANGE).relu().double().mean(1))
        return torch.cat(scores)
