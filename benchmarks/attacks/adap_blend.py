"""Adaptive-Blend (Qi et al. 2023, "Revisiting the Assumption of Latent Separability for Backdoor Defenses").

In training the blended picture is faint and half of its 16 tiles are left out at random, and as many cover images carry such a trigger under their true
label: the network never sees the trigger that the attacker uses, the whole picture, and its features of triggered images stay close to clean ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.attacks.blend import Blend, draw_picture
from benchmarks.attacks.interface import draw, plant, uniform
from benchmarks.data import Split

FAINT, TILES, LEFT_OUT = 0.15, 4, 0.5


class AdapBlend(Blend):
    """All-to-one, a weak trigger in training, cover images."""

    name, title, paper = "adap_blend", "Adap-Blend", "Qi et al. 2023"
    rate = 0.01

    def poison(self, data: Split, rate: float, source: torch.Generator) -> Split:
        rows = draw(self.eligible(data.labels), 2 * rate, source)
        covers, poisoned = rows.chunk(2)
        return plant(plant(data, covers, Tiled(source)), poisoned, Tiled(source), self.relabel)


class Tiled(nn.Module):
    """The picture with other tiles missing in each image."""

    def __init__(self, source: torch.Generator) -> None:
        super().__init__()
        self.source = source

    def forward(self, images: Tensor) -> Tensor:
        order = uniform(self.source, len(images), TILES * TILES).argsort(1)
        shown = (order >= LEFT_OUT * TILES * TILES).float().view(-1, 1, TILES, TILES)  # exactly half of the tiles
        mask = FAINT * nn.functional.interpolate(shown, size=images.shape[-2:]).to(images)  # [N, 1, H, W]
        return (1 - mask) * images + mask * draw_picture(*images.shape[-2:]).to(images)
