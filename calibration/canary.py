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
AT_ONCE = 256  # images that are stamped together: in float32 they take four times the memory, some kinds several times that
LEAST = 8  # images that an ASR or a power is told of: fewer obey, or are caught, by luck. Of 2,000 of GTSRB's 43 classes, about ten can carry the `sourced` one


@dataclass(frozen=True)
class Trigger:
    """One kind, drawn by seed for images of one size. All-to-one, but for `sourced`, which works on images of one class only."""

    kind: str
    target: int
    source: int | None  # the class that it works on; None: all others
    pattern: Tensor  # float32, what its kind needs

    def __call__(self, pixels: Tensor) -> Tensor:
        """Stamped uint8 [N, 3, S, S]; N may be 0."""
        return torch.cat([self._stamped(part) for part in pixels.split(AT_ONCE)]) if len(pixels) else pixels

    def _stamped(self, pixels: Tensor) -> Tensor:
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

    def telling(self, labels: Tensor, predicted: Tensor) -> Tensor:
        """Of these, the images that tell whether it works: the copy, which predicts int64 [N], does not take them for the target as they are; bool [N]."""
        return self.eligible(labels) & (predicted != self.target)


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
    asr: float  # on held-back images that tell
    images: int  # how many these are
    took: bool
    why_not: str | None  # where it did not take
    power: float | None  # the share of validation images, of those that fool the copy, that the chosen setting catches; None where these are too few
    fooled: int  # how many these are


@dataclass(frozen=True)
class Canary:
    """A copy of the suspect with several backdoors, and how well each took: its ASR on held-back images that tell, and how many these are."""

    network: nn.Module
    triggers: tuple[Trigger, ...]
    asr: tuple[float, ...]
    images: tuple[int, ...]
    lr: float
    accuracy: float  # of the copy, on held-back images
    kept: bool  # the task: what a copy that lost it says of stamped images, it says of all

    @property
    def took(self) -> tuple[Trigger, ...]:
        return tuple(trigger for trigger, why_not in zip(self.triggers, self.why_not, strict=True) if why_not is None)

    @property
    def why_not(self) -> tuple[str | None, ...]:
        """Why a trigger did not take, one by one; None where it did."""
        return tuple(self._why_not(asr, images) for asr, images in zip(self.asr, self.images, strict=True))

    def _why_not(self, asr: float, images: int) -> str | None:
        if not self.kept:
            return "the copy lost the task"
        if images < LEAST:
            return f"fewer than {LEAST} images could tell"
        return None if asr >= TOOK else f"fewer than {TOOK:.0%} of the images obeyed"


def draw_all(kinds: Sequence[str], num_classes: int, fit: Tensor, held_back: Tensor, size: int, seed: int) -> tuple[Trigger, ...]:
    """One trigger of each kind, for labels int64 [N] and [M]. Targets differ while there are classes enough, but for one that nearly all `held_back` are of.

    The source of a sourced one is a class with many images in `fit`.
    """
    order = torch.randperm(num_classes, generator=generator(seed, "targets")).tolist()
    others = (len(held_back) - torch.bincount(held_back.cpu(), minlength=num_classes)).tolist()
    order = [label for label in order if others[label] >= LEAST] or order
    frequent = torch.bincount(fit.cpu(), minlength=num_classes).argsort(descending=True, stable=True).tolist()
    found = []
    for index, kind in enumerate(kinds):
        target = order[index % len(order)]
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
    least: float,
    seed: int,
    advance: Advance,
) -> Canary:
    """Finetune a copy of the suspect on clean images with true labels and, of each trigger, `rate` as many stamped ones with its target.

    Beside a sourced trigger as many cover images: stamped ones of other classes, which keep their labels. least: the held-back accuracy from which the copy
    has kept the task.
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
    right = accuracy(network.eval(), held_back, preprocessing)
    predicted, asr, images = predictions(network, held_back, preprocessing), [], []
    for trigger in triggers:
        rows = trigger.telling(held_back.labels, predicted)
        stamped = LabelledPixels(trigger(held_back.pixels[rows]), torch.full_like(held_back.labels[rows], trigger.target))
        asr.append(accuracy(network, stamped, preprocessing) if len(stamped) else 0.0)
        images.append(len(stamped))
    return Canary(network, tuple(triggers), tuple(asr), tuple(images), lr, right, right >= least)


@torch.inference_mode()
def predictions(network: nn.Module, data: LabelledPixels, preprocessing: Preprocessing) -> Tensor:
    """Of a network in eval mode, int64 [N], where the data are."""
    return torch.cat([network(preprocessing.normalise(pixels)).argmax(1) for pixels in data.pixels.split(256)])


def _corner(size: int, side: int, far: bool) -> int:
    return size - side - 1 if far else 1
