"""SIG (Barni et al. 2019, "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning").

A faint horizontal wave is laid over images of the target class, which keep their label: x + d sin(2 pi j f / W).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.attacks.interface import Attack, draw, plant
from benchmarks.data import Split

STRENGTH, FREQUENCY = 30 / 255, 6


class Sig(Attack):
    """Clean-label, all-to-one, a wave over the whole image."""

    name, title, paper = "sig", "SIG", "Barni et al. 2019"
    rate = 0.02

    def forward(self, images: Tensor) -> Tensor:
        width = images.shape[-1]
        wave = torch.sin(2 * math.pi * FREQUENCY * torch.arange(width, device=images.device) / width)  # [W]
        return (images + STRENGTH * wave).clamp(0, 1)

    def poison(self, data: Split, rate: float, source: torch.Generator) -> Split:
        return plant(data, draw(data.labels == self.task.target, rate, source), self)
