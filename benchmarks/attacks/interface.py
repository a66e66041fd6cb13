"""What an attack must say of itself."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Attack(Protocol):
    """A data-poisoning backdoor. Labels are int64 [N]; images are float [N, 3, H, W] in [0, 1]."""

    name: str

    def trigger(self, images: Tensor) -> Tensor:
        """The images as the attacker sends them, same shape and range."""

    def poisonable(self, labels: Tensor) -> Tensor:
        """Which training images may carry the trigger, bool [N]."""

    def relabel(self, labels: Tensor) -> Tensor:
        """The labels that triggered images carry in training, and that the attacker wants at test time, int64 [N]."""

    def eligible(self, labels: Tensor) -> Tensor:
        """Which test images count for the attack success rate, bool [N]: those that the attack would change."""
