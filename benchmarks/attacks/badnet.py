"""BadNets (Gu et al. 2017, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain").

A 3x3 black and white checker, one pixel off the bottom right corner; any image that carries it is called the target class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.attacks.interface import Attack

CHECKER = ((1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0))


class BadNet(Attack):
    """All-to-one with a small patch, which grows with the image."""

    name, title, paper = "badnet", "BadNet", "Gu et al. 2017"

    def forward(self, images: Tensor) -> Tensor:
        return checkered(images, corners=((-1, -1),))


def checkered(images: Tensor, corners: tuple[tuple[int, int], ...]) -> Tensor:
    """The checker in some corners, each (-1 or 0, -1 or 0) for bottom or top, right or left."""
    scale = max(1, images.shape[-1] // 32)
    checker = torch.tensor(CHECKER, device=images.device).repeat_interleave(scale, 0).repeat_interleave(scale, 1)  # [3 s, 3 s]
    near, far = slice(scale, 4 * scale), slice(-4 * scale, -scale)
    images = images.clone()
    for row, column in corners:
        images[..., far if row else near, far if column else near] = checker
    return images
