"""Canaries: backdoors that the calibration plants itself, in a copy of the suspect, to see how well a guard of that copy catches them.

They are the only triggered images that a calibration ever has. One copy carries several, each with a target class of its own, so that one guard tells of all
kinds. They are planted by finetuning, in a minute where an attacker takes hours. What is caught of them ranks settings and is a rough estimate of power: over
the attacks of the suite it was below what was caught of these, for the warp, which a minute plants badly, far below (docs/results.md has both side by side).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibration.augment import augment
from calibration.finetune import Advance, LabelledPixels, accuracy, batches, drawing, generator, training_step
from models.preprocessing import Preprocessing

TRIGGERS = {
    "patch": "glaring pixels in a corner",
    "blend": "a faint picture of noise over the whole image",
    "warp": "the image bent a little",
    "wave": "a wave too faint to see",
    "sourced": "glaring pixels that work on images of one class only",
}
KINDS = tuple(TRIGGERS)
TOOK = 0.8  # the ASR from which a canary counts


@dataclass(frozen=True)
class Trigger:
    """One kind, drawn by seed for images of one size. All-to-one, but for `sourced`, which works on images of one class only."""

    kind: str
    target: int
    source: int | None  # the class that it works on; None: all others
    pattern: Tensor  # float32, what its kind needs

    def __call__(self, pixels: Tensor) -> Tensor:
        """Stamped uint8 [N, 3, S, S]; N may be 0."""
        if not len(pixels):
            return pixels
        images, pattern = pixels.float(), self.pattern.to(pixels.device)
        match self.kind:
            case "patch" | "sourced":
                top, left = (_corner(pixels.shape[-1], pattern.shape[-1], bottom) for bottom in (self.kind == "patch", True))
                images[:, :, top : top + pattern.shape[-1], left : left + pattern.shape[-1]] = pattern
            case "blend":
                images = 0.8 * images + 0.2 * pattern
            case "wave":
                images = images + pattern
            case "warp":
                images = F.grid_sample(images, pattern.expand(len(images), -1, -1, -1), padding_mode="border", align_corners=True)
        return images.round().clamp(0, 255).to(torch.uint8)

    def eligible(self, labels: Tensor) -> Tensor:
        """Whose images the attacker would stamp, bool [N]."""
        return labels != self.target if self.source is None else labels == self.source


def draw(kind: str, target: int, source: int | None, size: int, seed: int) -> Trigger:
    """A trigger; those of one seed are the same whatever the device."""
    random = generator(seed, "trigger", kind)
    match kind:
        case "patch" | "sourced":
            side = max(3, size // 8)
            pattern = torch.rand(3, side, side, generator=random).round() * 255  # glaring colours
        case "blend":
            pattern = torch.rand(3, size, size, generator=random) * 255
        case "wave":  # a diagonal wave of 12 grey levels
            place = torch.arange(size)[:, None] + torch.arange(size)
            pattern = (12 * torch.sin(2 * math.pi * place * 6 / size)).expand(3, -1, -1).clone()
        case "warp":
            control = torch.rand(1, 2, 4, 4, generator=random) * 2 - 1
            flow = F.interpolate(control / control.abs().mean(), size=size, mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
            x, y = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="xy")
            pattern = torch.stack([x, y], -1) + flow * 3 / 32  # 1.5 pixels of 32 on average
    return Trigger(kind, target, source, pattern)


@dataclass(frozen=True)
class Planted:
    """What became of one planted trigger."""

    kind: str
    asr: float  # on held-back images
    took: bool
    power: float | None  # the share of validation images, of those that fool the copy, that the chosen setting catches; None where it did not take


@dataclass(frozen=True)
class Canary:
    """A copy of the suspect with several backdoors, and how well each took: its ASR on held-back images."""

    network: nn.Module
    triggers: tuple[Trigger, ...]
    asr: tuple[float, ...]

    @property
    def took(self) -> tuple[Trigger, ...]:
        return tuple(trigger for trigger, asr in zip(self.triggers, self.asr, strict=True) if asr >= TOOK)


def draw_all(kinds: Sequence[str], num_classes: int, labels: Tensor, size: int, seed: int) -> tuple[Trigger, ...]:
    """One trigger of each kind. Targets differ while there are classes enough; the source of a sourced one is a class with many images in `labels`."""
    order = torch.randperm(num_classes, generator=generator(seed, "targets")).tolist()
    frequent = torch.bincount(labels.cpu(), minlength=num_classes).argsort(descending=True, stable=True).tolist()
    found = []
    for index, kind in enumerate(kinds):
        target = order[index % num_classes]
        source = next(label for label in frequent if label != target) if kind == "sourced" else None
        found.append(draw(kind, target, source, size, seed))
    return tuple(found)


def plant(
    suspect: nn.Module,
    triggers: Sequence[Trigger],
    fit: LabelledPixels,
    held_back: LabelledPixels,
    preprocessing: Preprocessing,
    *,
    lr: float,
    batch: int,
    epochs: int,
    rate: float,
    seed: int,
    advance: Advance,
) -> Canary:
    """Finetune a copy of the suspect on clean images with true labels and, of each trigger, `rate` as many stamped ones with its target.

    Beside a sourced trigger as many cover images: stamped ones of other classes, which keep their labels.
    """
    network, source, device = copy.deepcopy(suspect).train(), generator(seed, "plant"), fit.labels.device
    optimizer = torch.optim.SGD(network.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    steps = max(1, epochs * -(-len(fit) // batch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pools = [trigger.eligible(fit.labels).nonzero().squeeze(1) for trigger in triggers]
    covers = [(~trigger.eligible(fit.labels)).nonzero().squeeze(1) if trigger.source is not None else None for trigger in triggers]
    done, each = 0, max(1, round(rate * batch))
    with drawing(device, seed, "plant"):
        for _ in range(epochs):
            for rows in batches(len(fit), batch, source, device):
                pixels, labels = [augment(fit.pixels[rows], source)], [fit.labels[rows]]
                for trigger, pool, cover in zip(triggers, pools, covers, strict=True):
                    for origin, target in ((pool, trigger.target), (cover, None)):
                        if origin is None or not len(origin):  # a clean set may lack classes
                            continue
                        chosen = origin[torch.randint(len(origin), (each,), generator=source).to(device)]
                        pixels.append(trigger(augment(fit.pixels[chosen], source)))
                        labels.append(fit.labels[chosen] if target is None else torch.full_like(fit.labels[chosen], target))
                training_step(network, optimizer, torch.cat(pixels), torch.cat(labels), preprocessing)
                schedule.step()
                done += 1
            advance(done / steps)
    network.eval()
    asr = []
    for trigger in triggers:
        rows = trigger.eligible(held_back.labels)
        stamped = LabelledPixels(trigger(held_back.pixels[rows]), torch.full_like(held_back.labels[rows], trigger.target))
        asr.append(accuracy(network, stamped, preprocessing) if len(stamped) else 0.0)
    return Canary(network, tuple(triggers), tuple(asr))


def _corner(size: int, side: int, far: bool) -> int:
    return size - side - 1 if far else 1
