"""Published backdoor attacks, one file each, behind one interface.

An attack that poisons data is a trigger, a rule that says which training images get it and which label they then carry, and a rule
that says which test images an attacker would use it on. Images are float [N, 3, H, W] in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attacks import badnet, blend
from benchmarks.attacks.interface import Attack

ATTACKS: dict[str, Callable[[], Attack]] = {"badnet": badnet.BadNet, "blend": blend.Blend}


@dataclass(frozen=True)
class Poisoned:
    """A training set after the attack: images uint8 [N, 3, H, W], labels int64 [N], and which rows were touched, bool [N]."""

    images: Tensor
    labels: Tensor
    touched: Tensor


def poison(attack: Attack, images: Tensor, labels: Tensor, rate: float, seed: int) -> Poisoned:
    """Plant the trigger in a share `rate` of the training set (uint8 images [N, 3, H, W]) and relabel those images."""
    generator = torch.Generator().manual_seed(seed)
    eligible = attack.poisonable(labels).nonzero().flatten()
    count = round(rate * len(labels))
    if count > len(eligible):
        raise ValueError(f"{attack.name} can poison {len(eligible)} images, not the {count} that a rate of {rate} asks for")
    chosen = eligible[torch.randperm(len(eligible), generator=generator)[:count]]
    touched = torch.zeros(len(labels), dtype=torch.bool)
    touched[chosen] = True
    images, labels = images.clone(), labels.clone()
    images[chosen] = stamp(attack, images[chosen])
    labels[chosen] = attack.relabel(labels[chosen])
    return Poisoned(images, labels, touched)


def stamp(attack: Attack, images: Tensor) -> Tensor:
    """Put the trigger on uint8 images [N, 3, H, W]; rounds as a saved picture would."""
    return (attack.trigger(images.float() / 255) * 255).round().clamp(0, 255).to(torch.uint8)


__all__ = ["ATTACKS", "Attack", "Poisoned", "poison", "stamp"]
