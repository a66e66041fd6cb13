"""All-to-all (Gu et al. 2017, section 3): the trigger moves every class to another one.

The map is y -> y + 3 instead of the usual y + 1, which is the very map that the published backdoor expert is taught.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.attacks.badnet import checkered
from benchmarks.attacks.interface import Attack

SHIFT = 3


class AllToAll(Attack):
    """BadNet's patch; each class has a target of its own."""

    name, title, paper = "all_to_all", "All-to-all", "Gu et al. 2017"
    rate = 0.1

    def forward(self, images: Tensor) -> Tensor:
        return checkered(images, corners=((-1, -1),))

    def eligible(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool)

    def relabel(self, labels: Tensor) -> Tensor:
        return (labels + SHIFT) % self.task.num_classes
