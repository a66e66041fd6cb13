"""BppAttack (Wang et al. 2022, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image Quantization and Contrastive
Adversarial Learning").

The trigger is fewer colours: 8 levels a channel with Floyd-Steinberg dithering. As many images carry what the quantisation of another image left and keep their
label, so that noise of that kind alone does nothing. Rows are chosen once instead of anew in each batch: dithering is sequential and would be most of the work.
Training starts from the clean network: few epochs from scratch do not learn it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.attacks.interface import Attack, Recipe, draw, plant
from benchmarks.data import Split

LEVELS = 8


class Bpp(Attack):
    """All-to-one by training control; invisible."""

    name, title, paper = "bpp", "BPP", "Wang et al. 2022"
    kind = "training"
    rate = 0.2
    recipe = Recipe(epochs=12, lr=0.1)

    def forward(self, images: Tensor) -> Tensor:
        return dithered(images)

    def poison(self, data: Split, rate: float, source: torch.Generator) -> Split:
        rows = draw(torch.ones_like(data.labels, dtype=torch.bool), 2 * rate, source)
        poisoned, negatives = rows.chunk(2)
        done = plant(data, poisoned, self, self.relabel)
        residual = done.images[poisoned].float() - data.images[poisoned].float()
        done.images[negatives] = (data.images[negatives].float() + residual[: len(negatives)]).clamp(0, 255).to(torch.uint8)
        return done


def dithered(images: Tensor) -> Tensor:
    """Floyd-Steinberg error diffusion to LEVELS values a channel; the loop is over pixels, for all images at once."""
    work = torch.nn.functional.pad(images.float().permute(2, 3, 0, 1), (0, 0, 0, 0, 1, 1, 0, 1)).contiguous()  # [H + 1, W + 2, N, 3]
    height, width = images.shape[-2:]
    for y in range(height):
        for x in range(1, width + 1):
            old = work[y, x].clone()
            new = (old * (LEVELS - 1)).round().clamp(0, LEVELS - 1) / (LEVELS - 1)
            error = old - new
            work[y, x] = new
            work[y, x + 1] += error * (7 / 16)
            work[y + 1, x - 1] += error * (3 / 16)
            work[y + 1, x] += error * (5 / 16)
            work[y + 1, x + 1] += error * (1 / 16)
    return work[:height, 1 : width + 1].permute(2, 3, 0, 1).contiguous()
