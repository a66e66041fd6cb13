"""BadNets (Gu et al. 2017, "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain").

A 3x3 black and white checker, one pixel off the bottom right corner; any image that carries it is called the target class.
"""

from __future__ import annotations

import torch
from torch import Tensor


class BadNet:
    """All-to-one with a small patch."""

    name = "badnet"

    def __init__(self, target: int = 0) -> None:
        self.target = target

    def trigger(self, images: Tensor) -> Tensor:
        checker = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]], device=images.device)
        images = images.clone()
        images[..., -4:-1, -4:-1] = checker  # [3, 3] over [N, 3, 3, 3]
        return images

    def poisonable(self, labels: Tensor) -> Tensor:
        return labels != self.target

    def relabel(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.target)

    def eligible(self, labels: Tensor) -> Tensor:
        return labels != self.target
