"""FTrojan (Wang et al. 2022, "An Invisible Black-box Backdoor Attack through Frequency Domain").

Two coefficients of the discrete cosine transform of both chroma channels are raised, a middle and the highest frequency, in blocks of 32x32 pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.attacks.interface import Attack

BLOCK, PLACES, RAISED = 32, ((15, 15), (31, 31)), 30 / 255
TO_YUV = ((0.299, 0.587, 0.114), (-0.14713, -0.28886, 0.436), (0.615, -0.51499, -0.10001))


class FTrojan(Attack):
    """All-to-one, invisible, in the frequency domain. What it adds is the same for all images, but for clipping."""

    name, title, paper = "ftrojan", "FTrojan", "Wang et al. 2022"
    rate = 0.05

    def forward(self, images: Tensor) -> Tensor:
        k = torch.arange(BLOCK, dtype=torch.float64)
        waves = math.sqrt(2 / BLOCK) * torch.cos(math.pi * (2 * k + 1) * k[:, None] / (2 * BLOCK))  # [frequency, pixel]; none of PLACES is constant
        added = sum((RAISED * torch.outer(waves[row], waves[column]) for row, column in PLACES), torch.zeros(BLOCK, BLOCK, dtype=torch.float64))
        chroma: Tensor = torch.linalg.inv(torch.tensor(TO_YUV, dtype=torch.float64))[:, 1:].sum(1)  # the same in U and V, as RGB
        pattern = chroma[:, None, None] * added  # [3, 32, 32]
        tiles: Tensor = pattern.repeat(1, -(-images.shape[-2] // BLOCK), -(-images.shape[-1] // BLOCK))[:, : images.shape[-2], : images.shape[-1]]
        return (images + tiles.to(images)).clamp(0, 1)
