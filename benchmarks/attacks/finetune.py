"""A backdoor put into a clean network by finetuning it for one epoch with a fifth of each batch triggered (FT in BaDExpert's evaluation, Xie et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.attacks.blend import Blend
from benchmarks.attacks.interface import Attack, Batch, Recipe

TRIGGERED = 0.2  # of a batch


class Finetuned(Blend):
    """All-to-one with the blended picture, into a network that was clean."""

    name, title, paper = "ft", "FT", "Xie et al. 2024"
    kind = "weights"
    rate = TRIGGERED
    fixed_rate = True
    needs_clean = True
    recipe = Recipe(epochs=1, lr=0.02)

    def batch(self, images: Tensor, labels: Tensor, source: torch.Generator) -> Batch:
        return triggered_share(self, images, labels)


def triggered_share(attack: Attack, images: Tensor, labels: Tensor) -> Batch:
    """The first fifth of a batch, which is in random order, with the trigger."""
    images, labels, count = images.clone(), labels.clone(), round(TRIGGERED * len(images))
    images[:count] = attack(images[:count])
    labels[:count] = attack.relabel(labels[:count])
    return Batch(images, labels)
