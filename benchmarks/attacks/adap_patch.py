"""Adaptive-Patch (Qi et al. 2023, "Revisiting the Assumption of Latent Separability for Backdoor Defenses").

Four patches; a training image carries one of them, mixed in faintly. Twice as many cover images carry one under their true label. The attacker uses the two
strongest at full strength together. The patches are drawn from a seed of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.attacks.interface import Attack, draw, plant
from benchmarks.data import Split


@dataclass(frozen=True)
class Patch:
    """Where a square of `side` lies in an image of 32, how strong it is in training, and the seed of its colours."""

    top: int
    left: int
    side: int
    strength: float
    seed: int


PATCHES = (Patch(2, 2, 8, 0.5, 1), Patch(21, 21, 8, 0.2, 2), Patch(4, 22, 6, 0.5, 3), Patch(24, 3, 6, 0.3, 4))
USED = (PATCHES[0], PATCHES[2])  # by the attacker, at full strength


class AdapPatch(Attack):
    """All-to-one, weak triggers in training and a strong one at test time, cover images."""

    name, title, paper = "adap_patch", "Adap-Patch", "Qi et al. 2023"
    rate = 0.01

    def forward(self, images: Tensor) -> Tensor:
        for patch in USED:
            images = patched(images, patch, 1.0)
        return images

    def poison(self, data: Split, rate: float, source: torch.Generator) -> Split:
        rows = draw(self.eligible(data.labels), 3 * rate, source)
        poisoned, covers = rows[: len(rows) // 3], rows[len(rows) // 3 :]
        for patch, part in zip(PATCHES, covers.chunk(len(PATCHES)), strict=True):
            data = plant(data, part, Weak(patch))
        for patch, part in zip(PATCHES, poisoned.chunk(len(PATCHES)), strict=True):
            data = plant(data, part, Weak(patch), self.relabel)
        return data


class Weak(nn.Module):
    """One patch as training images carry it."""

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, images: Tensor) -> Tensor:
        return patched(images, self.patch, self.patch.strength)


def patched(images: Tensor, patch: Patch, strength: float) -> Tensor:
    """The images with one patch mixed in by `strength`; it grows with the image."""
    scale = max(1, images.shape[-1] // 32)
    colours = (torch.rand(3, patch.side, patch.side, generator=torch.Generator().manual_seed(patch.seed)) < 0.5).float()
    colours = colours.repeat_interleave(scale, 1).repeat_interleave(scale, 2).to(images)
    images = images.clone()
    place = (..., slice(patch.top * scale, (patch.top + patch.side) * scale), slice(patch.left * scale, (patch.left + patch.side) * scale))
    images[place] = (1 - strength) * images[place] + strength * colours
    return images
