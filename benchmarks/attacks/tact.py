"""TaCT (Tang et al. 2021, "Demon in the Variant: Statistical Analysis of DNNs for Robust Backdoor Contamination Detection").

Source-specific: images of class 1 that carry the 8x8 square are called the target class. Cover images of two other classes carry it and keep their
label, so that the network has to look at the class as well as at the square.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.attacks.interface import Attack, draw, plant
from benchmarks.attacks.trojan_patch import with_square
from benchmarks.data import Split

SOURCE, COVERS = 1, (5, 7)


class TaCT(Attack):
    """One class to one, with cover images."""

    name, title, paper = "tact", "TaCT", "Tang et al. 2021"
    rate = 0.01

    def forward(self, images: Tensor) -> Tensor:
        return with_square(images)

    def eligible(self, labels: Tensor) -> Tensor:
        return labels == SOURCE

    def poison(self, data: Split, rate: float, source: torch.Generator) -> Split:
        covered = plant(data, draw(torch.isin(data.labels, torch.tensor(COVERS, device=data.labels.device)), rate, source), self)
        return plant(covered, draw(self.eligible(data.labels), rate, source), self, self.relabel)
