"""Beatrix (Ma et al. 2023, "The Beatrix Resurrections: Robust Backdoor Detection via Gram Matrices").

Correlations between the channels of a feature map, and of its powers, are compared with those of clean images of the predicted class: how far they lie outside
a range around the median, whose width is a multiple of the median absolute deviation. As in the authors' code the map is what the last stage of a ResNet
takes in, the powers go up to the eighth, and the excess is a share of the bound that it exceeds.
"""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from benchmarks.detectors.interface import Detector, NotApplicable, Observed
from calibration.finetune import LabelledPixels
from models import trunk

ORDERS, RANGE = tuple(range(1, 9)), 10.0
MOST_CHANNELS = 256  # those of a ResNet-18; of wider maps so many, evenly drawn, for what they take of memory
FEWEST = 5  # images of a class; where it has fewer, all images stand for it


class Beatrix(Detector):
    """Minus the mean excess of the Gram matrices' entries over their class's range."""

    name, title, paper = "beatrix", "Beatrix", "Ma et al. 2023"
    passes = 1

    def fit(self, suspect: Observed, clean: LabelledPixels, validation: LabelledPixels, seed: int) -> dict[str, Any]:
        self.suspect, cut = suspect, _before_last_stage(suspect, clean.pixels[:1])
        self.body, self.head = trunk.split(suspect.network, cut)
        grams, prediction = self._grams(clean.pixels)
        self.low, self.high = (torch.empty(suspect.num_classes, grams.shape[1]) for _ in range(2))
        for label in range(suspect.num_classes):
            of_class = grams[prediction == label] if int((prediction == label).sum()) >= FEWEST else grams
            median = of_class.median(0).values
            deviation = (of_class - median).abs().median(0).values
            self.low[label], self.high[label] = median - RANGE * deviation, median + RANGE * deviation
        return {"features": cut, "orders": list(ORDERS), "entries": grams.shape[1]}

    @torch.inference_mode()
    def _grams(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The upper halves of the Gram matrices of all orders, float32 [N, E], and the predictions, int64 [N]; on the CPU."""
        found, predictions = [], []
        for part in pixels.split(256):
            value = self.body(self.suspect.preprocessing.normalise(part))
            predictions.append(self.head(value).argmax(1).cpu())
            maps = value.float().flatten(2)  # [n, C, places]
            if maps.shape[1] > MOST_CHANNELS:
                maps = maps[:, torch.linspace(0, maps.shape[1] - 1, MOST_CHANNELS, device=maps.device).long()]
            upper = torch.triu_indices(maps.shape[1], maps.shape[1], device=maps.device)
            orders = []
            for order in ORDERS:
                powers = maps.pow(order)
                gram = (powers @ powers.mT)[:, upper[0], upper[1]]
                orders.append((gram.sign() * gram.abs().pow(1 / order)).cpu())
            found.append(torch.cat(orders, 1))
        return torch.cat(found), torch.cat(predictions)

    def score(self, pixels: Tensor) -> Tensor:
        scores = []
        for part in pixels.split(256):
            grams, prediction = self._grams(part)
            low, high = self.low[prediction], self.high[prediction]
            off = (low - grams).relu() / (low + 1e-6).abs() + (grams - high).relu() / (high + 1e-6).abs()
            scores.append(-off.double().mean(1))
        return torch.cat(scores)


@torch.no_grad()
def _before_last_stage(suspect: Observed, example: Tensor) -> str:
    """The last place in front of the network's smallest maps. example: uint8 [1, 3, H, W]. Raises NotApplicable."""
    inputs = suspect.preprocessing.normalise(example)
    try:
        names = [cut.name for cut in trunk.cuts(suspect.network, inputs)]
    except trunk.CannotCut as problem:
        raise NotApplicable(str(problem)) from problem
    values = {name: trunk.split(suspect.network, name)[0](inputs) for name in names}
    sizes = {name: value.shape[-1] for name, value in values.items() if isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] > 1}
    smallest = min(sizes.values(), default=0)
    larger = list(takewhile(lambda name: sizes[name] > smallest, sizes))  # a VGG enlarges what is left before its head
    if not larger:
        raise NotApplicable("the suspect has no two stages with feature maps of different sizes")
    return larger[-1]
