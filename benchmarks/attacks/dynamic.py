"""Input-aware dynamic attack (Nguyen and Tran 2020, "Input-Aware Dynamic Backdoor Attack").

Two small generators give each image a pattern and a mask of its own. The mask generator is trained first: sparse, and different for different images. The
pattern generator is trained with the network: patterns of different images must differ, and an image with the pattern of another (a tenth of a batch) keeps its
label, so that a pattern works for its own image only. Training starts from the clean network: few epochs from scratch do not learn it.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from benchmarks.attacks.interface import Attack, Batch, Recipe, Surrogate, Task
from benchmarks.data import Split

DENSITY, DIVERSITY, MASK_STEPS = 0.032, 1.0, 400
POISONED, CROSS = 0.1, 0.1  # of a batch


class Dynamic(Attack):
    """All-to-one by training control; each image carries another trigger."""

    name, title, paper = "dynamic", "Dynamic", "Nguyen and Tran 2020"
    kind = "training"
    rate = POISONED
    fixed_rate = True
    recipe = Recipe(epochs=12, lr=0.1)

    def __init__(self, task: Task, seed: int = 0) -> None:
        super().__init__(task, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pattern, self.mask = generator(3), generator(1)
        self.mask.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.apply_to(images, images)

    def apply_to(self, images: Tensor, given: Tensor) -> Tensor:
        """The images with the triggers of the images `given`."""
        pattern: Tensor = self.pattern(given).sigmoid()
        return images + (pattern - images) * self.masks(given)

    def masks(self, images: Tensor) -> Tensor:
        """[N, 1, H, W] in [0, 1], nearly binary."""
        raw: Tensor = self.mask(images)
        return (10 * raw.tanh()).tanh() / 2 + 0.5

    def prepare(self, data: Split, surrogate: Surrogate | None, source: torch.Generator) -> None:
        self.mask.requires_grad_(True)
        optimizer = torch.optim.Adam(self.mask.parameters(), 0.01)
        for _ in range(MASK_STEPS):
            first, second = (data.images[torch.randint(len(data.labels), (64,), generator=source)].float() / 255 for _ in range(2))
            masks = self.masks(first), self.masks(second)
            loss = 100 * (masks[0] - DENSITY).relu().mean() + diversity(first, second, *masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.mask.requires_grad_(False)

    def batch(self, images: Tensor, labels: Tensor, source: torch.Generator) -> Batch:
        poisoned, cross = round(POISONED * len(images)), round(CROSS * len(images))
        first, second, rest = images[:poisoned], images[poisoned : poisoned + cross], images[poisoned + cross :]
        others = images[-cross:]
        labels = labels.clone()
        labels[:poisoned] = self.relabel(labels[:poisoned])
        penalty = DIVERSITY * diversity(first, second[: len(first)], self.pattern(first).sigmoid(), self.pattern(second[: len(first)]).sigmoid())
        return Batch(torch.cat([self(first), self.apply_to(second, others), rest]), labels, penalty)


def generator(channels: int) -> nn.Sequential:
    """Down to an eighth of the side and up again: images [N, 3, H, W] in [0, 1] -> [N, channels, H, W], unbounded.

    Normalised within each image, so that a trigger does not depend on what else is in the batch.
    """
    widths = (3, 16, 32, 64)
    layers: list[nn.Module] = []
    for wide, wider in itertools.pairwise(widths):
        layers += [nn.Conv2d(wide, wider, 3, padding=1), nn.GroupNorm(4, wider), nn.ReLU(), nn.MaxPool2d(2)]
    for wide, wider in zip(reversed(widths[1:]), (32, 16, 16), strict=True):
        layers += [nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(wide, wider, 3, padding=1), nn.GroupNorm(4, wider), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, channels, 3, padding=1))


def diversity(first: Tensor, second: Tensor, out_first: Tensor, out_second: Tensor) -> Tensor:
    """How far apart two batches are, over how far apart is what was made of them; the smaller the better."""
    inputs = (first - second).square().mean((1, 2, 3)).sqrt()
    outputs = (out_first - out_second).square().mean((1, 2, 3)).add(1e-8).sqrt()
    return (inputs / (outputs + 1e-3)).mean()
