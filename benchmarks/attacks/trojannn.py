"""TrojanNN (Liu et al. 2018, "Trojaning Attack on Neural Networks").

The trigger is made for the network: a patch, optimised so that it excites a few chosen units in front of the head. The network is then retrained for a short
while on images with it, which strengthens a path that is already there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.attacks.finetune import TRIGGERED, triggered_share
from benchmarks.attacks.interface import Attack, Batch, Recipe, Surrogate, Task, uniform
from benchmarks.data import Split
from models import trunk
from models.distance import vectors

SIDE, UNITS, STEPS = 6, 2, 300


class TrojanNN(Attack):
    """All-to-one with a patch that was optimised on the clean network."""

    name, title, paper = "trojannn", "TrojanNN", "Liu et al. 2018"
    kind = "weights"
    rate = TRIGGERED
    fixed_rate = True
    needs_clean = True
    recipe = Recipe(epochs=1, lr=0.02)
    patch: Tensor

    def __init__(self, task: Task, seed: int = 0) -> None:
        super().__init__(task, seed)
        side = SIDE * max(1, task.size // 32)
        self.register_buffer("patch", uniform(torch.Generator().manual_seed(seed), 3, side, side))

    def forward(self, images: Tensor) -> Tensor:
        return self.patched(images, self.patch)

    def patched(self, images: Tensor, patch: Tensor) -> Tensor:
        images, side = images.clone(), patch.shape[-1]
        end = images.shape[-1] - max(1, images.shape[-1] // 32)
        images[..., end - side : end, end - side : end] = patch
        return images

    def prepare(self, data: Split, surrogate: Surrogate | None, source: torch.Generator) -> None:
        """Choose the units that clean images excite most, as dead ones lead nowhere, and find the patch that excites them still more."""
        assert surrogate is not None
        example = surrogate.normalise(data.images[:1].float() / 255)
        cut = trunk.feature_cut(surrogate.network, example)
        below = trunk.split(surrogate.network, cut.name)[0]
        rows = torch.randperm(len(data.labels), generator=source)[:512]
        images = data.images[rows].float() / 255
        with torch.no_grad():
            usual = vectors(below(surrogate.normalise(images)))  # [N, D]
        units = usual.mean(0).topk(UNITS).indices
        raw = torch.logit(self.patch, 1e-3).requires_grad_(True)
        optimizer = torch.optim.Adam([raw], 0.1)
        for step in range(STEPS):
            part = images[(step * 64) % 512 : (step * 64) % 512 + 64]
            excited = vectors(below(surrogate.normalise(self.patched(part, raw.sigmoid()))))[:, units]
            optimizer.zero_grad()
            (-excited.mean()).backward()
            optimizer.step()
        self.patch.copy_((raw.detach().sigmoid() * 255).round() / 255)

    def batch(self, images: Tensor, labels: Tensor, source: torch.Generator) -> Batch:
        return triggered_share(self, images, labels)
