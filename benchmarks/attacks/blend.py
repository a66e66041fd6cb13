"""Blended injection (Chen et al. 2017, "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning").

0.8 x + 0.2 t with one fixed full-size picture t. The picture is drawn here: coloured rings crossed by stripes, so that it has both
coarse and fine structure at any size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.attacks.interface import Attack

STRENGTH = 0.2


class Blend(Attack):
    """All-to-one with a faint picture over the whole image."""

    name, title, paper = "blend", "Blend", "Chen et al. 2017"

    def forward(self, images: Tensor) -> Tensor:
        picture = draw_picture(images.shape[-2], images.shape[-1]).to(images)  # [3, H, W]
        return (1 - STRENGTH) * images + STRENGTH * picture


def draw_picture(height: int, width: int) -> Tensor:
    """Rings and stripes, float [3, height, width] in {0, 1}."""
    y = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    x = torch.linspace(-1, 1, width)[None, :].expand(height, width)
    rings = torch.sin(5 * math.pi * torch.hypot(x + 0.3, y - 0.2)) > 0
    stripes = torch.sin(4 * math.pi * (x + y)) > 0
    bars = torch.sin(6 * math.pi * x - 2 * math.pi * y) > 0
    return torch.stack([rings, stripes ^ rings, bars]).float()
