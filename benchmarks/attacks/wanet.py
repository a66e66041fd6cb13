"""WaNet (Nguyen and Tran 2021, "WaNet - Imperceptible Warping-based Backdoor Attack").

A smooth warp of the image, the same for all. In each batch a tenth is warped and called the target class; as many are warped with random noise added to the
warp and keep their label, so that only the exact warp works. Training starts from the clean network: few epochs from scratch do not learn a trigger this faint.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.attacks.interface import Attack, Batch, Recipe, Task, uniform

CONTROL, STRENGTH = 4, 0.5
POISONED, NOISED = 0.1, 0.1  # of a batch


class WaNet(Attack):
    """All-to-one by training control; nothing is added to the image, it is only moved."""

    name, title, paper = "wanet", "WaNet", "Nguyen and Tran 2021"
    kind = "training"
    rate = POISONED
    fixed_rate = True
    recipe = Recipe(epochs=12, lr=0.1)
    flow: Tensor

    def __init__(self, task: Task, seed: int = 0) -> None:
        super().__init__(task, seed)
        control = uniform(torch.Generator().manual_seed(seed), 1, 2, CONTROL, CONTROL) * 2 - 1
        control = control / control.abs().mean()
        flow = F.interpolate(control, size=task.size, mode="bicubic", align_corners=True)  # [1, 2, S, S]
        self.register_buffer("flow", flow.permute(0, 2, 3, 1).contiguous())

    def forward(self, images: Tensor) -> Tensor:
        return warped(images, self.flow)

    def batch(self, images: Tensor, labels: Tensor, source: torch.Generator) -> Batch:
        poisoned, noised = round(POISONED * len(images)), round(NOISED * len(images))
        images, labels = images.clone(), labels.clone()
        images[:poisoned] = self(images[:poisoned])
        labels[:poisoned] = self.relabel(labels[:poisoned])
        rows = slice(poisoned, poisoned + noised)
        noise = (uniform(source, len(images[rows]), self.task.size, self.task.size, 2) * 2 - 1).to(images)
        images[rows] = warped(images[rows], self.flow + noise / STRENGTH)  # the noise itself is not weakened
        return Batch(images, labels)


def warped(images: Tensor, flow: Tensor) -> Tensor:
    """Each pixel taken from where the flow points: float [N or 1, H, W, 2], in units of STRENGTH pixels of a half-width grid."""
    height, width = images.shape[-2:]
    y, x = (torch.linspace(-1, 1, side, device=images.device) for side in (height, width))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # [H, W, 2]
    grid = (grid + STRENGTH * flow / height).clamp(-1, 1).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, align_corners=True).clamp(0, 1)
