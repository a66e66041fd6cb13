"""Clean-label attack (Turner et al. 2019, "Label-Consistent Backdoor Attacks").

Only images of the target class are touched, and keep their true label. They are first made hard to recognise by an adversarial perturbation on a clean
network, so that the trigger, a checker in each corner, is the easiest thing to learn from them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.attacks.badnet import checkered
from benchmarks.attacks.interface import Attack, Surrogate, draw, stamp
from benchmarks.data import Split

EPSILON, STEP, STEPS = 16 / 255, 4 / 255, 20
CORNERS = ((0, 0), (0, -1), (-1, 0), (-1, -1))


class CleanLabel(Attack):
    """Clean-label, all-to-one, a patch in each corner."""

    name, title, paper = "clean_label", "CL", "Turner et al. 2019"
    rate = 0.02
    needs_clean = True

    def prepare(self, data: Split, surrogate: Surrogate | None, source: torch.Generator) -> None:
        assert surrogate is not None
        self.__dict__["surrogate"] = surrogate  # not a part of the attack's own state

    def forward(self, images: Tensor) -> Tensor:
        return checkered(images, CORNERS)

    def poison(self, data: Split, rate: float, source: torch.Generator) -> Split:
        rows = draw(data.labels == self.task.target, rate, source)
        images = data.images.clone()
        for part in rows.split(250):
            images[part] = stamp(self, (adversarial(self.__dict__["surrogate"], images[part].float() / 255, data.labels[part]) * 255).round().to(torch.uint8))
        return Split(images, data.labels.clone())


def adversarial(surrogate: Surrogate, images: Tensor, labels: Tensor) -> Tensor:
    """Projected gradient ascent on the loss (Madry et al. 2018), within EPSILON of each value."""
    hard = images.clone()
    for _ in range(STEPS):
        hard.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(surrogate(hard), labels), hard)
        hard = (hard.detach() + STEP * gradient.sign()).clamp(images - EPSILON, images + EPSILON).clamp(0, 1)
    return hard.detach()
