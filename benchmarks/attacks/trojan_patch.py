"""The square of Trojaning Attack on Neural Networks (Liu et al. 2018), as research toolboxes poison data with it: one fixed coloured 8x8 square.

The pattern is drawn from a seed of its own, in the saturated colours that such squares have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.attacks.interface import Attack


class TrojanPatch(Attack):
    """All-to-one with a square at rows and columns 21 to 28 of 32."""

    name, title, paper = "trojan_patch", "Trojan patch", "Liu et al. 2018"

    def forward(self, images: Tensor) -> Tensor:
        return with_square(images)


def with_square(images: Tensor) -> Tensor:
    """The square, which grows with the image."""
    scale = max(1, images.shape[-1] // 32)
    source = torch.Generator().manual_seed(20180218)
    square = (torch.rand(3, 8, 8, generator=source) < 0.5).float().repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    images = images.clone()
    images[..., 21 * scale : 29 * scale, 21 * scale : 29 * scale] = square.to(images)
    return images
