"""ISSBA (Li et al. 2021, "Invisible Backdoor Attack with Sample-Specific Triggers").

An encoder hides a bit string in an image as a residual that cannot be seen and is another for each image; a decoder that reads it back is trained with it. The
attacker's string is the trigger.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.attacks.interface import Attack, Surrogate, Task
from benchmarks.data import Split
from calibration.augment import crop_flip

BITS, LARGEST, STEPS = 16, 0.06, 1200


class Issba(Attack):
    """All-to-one, invisible, another residual in each image."""

    name, title, paper = "issba", "ISSBA", "Li et al. 2021"
    rate = 0.05
    secret: Tensor

    def __init__(self, task: Task, seed: int = 0) -> None:
        super().__init__(task, seed)
        source = torch.Generator().manual_seed(seed)
        self.register_buffer("secret", (torch.rand(1, BITS, generator=source) < 0.5).float())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = Encoder()

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.encoder.hide(images, self.secret.expand(len(images), -1))
        return hidden

    def prepare(self, data: Split, surrogate: Surrogate | None, source: torch.Generator) -> None:
        """Train encoder and decoder on random strings; the decoder sees what training will show: shifted and mirrored images."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + 1)
            decoder = _decoder().to(self.secret.device)
        optimizer = torch.optim.Adam([*self.encoder.parameters(), *decoder.parameters()], 2e-3)
        for _ in range(STEPS):
            images = data.images[torch.randint(len(data.labels), (64,), generator=source)].float() / 255
            bits = (torch.rand(64, BITS, generator=source) < 0.5).float().to(images)
            hidden = self.encoder.hide(images, bits)
            read = decoder(crop_flip(hidden, source, pad=2))
            loss = F.binary_cross_entropy_with_logits(read, bits) + 20 * (hidden - images).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.encoder.requires_grad_(False).eval()


class Encoder(nn.Module):
    """Image and bits to a residual of at most LARGEST."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU())
        self.bits = nn.Linear(BITS, 8 * 8 * 8)
        widths = (24 + 8 + 3, 32, 24)
        hidden = [layer for wide, wider in itertools.pairwise(widths) for layer in (nn.Conv2d(wide, wider, 3, padding=1), nn.ReLU())]
        self.last = nn.Sequential(*hidden, nn.Conv2d(widths[-1], 3, 3, padding=1))

    def hide(self, images: Tensor, bits: Tensor) -> Tensor:
        """images [N, 3, H, W], bits [N, BITS] -> images with them."""
        planes = F.interpolate(self.bits(bits * 2 - 1).view(-1, 8, 8, 8), size=images.shape[-2:])  # [N, 8, H, W]
        residual: Tensor = self.last(torch.cat([self.first(images - 0.5), planes, images - 0.5], 1)).tanh()
        return (images + LARGEST * residual).clamp(0, 1)


def _decoder() -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, wider in ((3, 24), (24, 48), (48, 64)):
        layers += [nn.Conv2d(wide, wider, 3, stride=1 if wide == 3 else 2, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64 * 4, BITS))
