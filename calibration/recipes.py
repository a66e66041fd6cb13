"""The constants of the two presets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRecipe:
    """Constants of the published procedure: they were found per architecture and data set, with no rule given."""

    expert_lr: float = 1e-4
    auxiliary_lr: float = 0.1
    auxiliary_decay: float = 0.1  # the factor of each step
    c: float = 0.5
    expert_batch: int = 128
    auxiliary_batch: int = 64
    auxiliary_epochs: int = 10
    auxiliary_steps: tuple[int, ...] = (2, 4, 6, 8)


def paper_recipe(architecture: str, size: int) -> PaperRecipe:
    """The published constants for this kind of network and input size; the CIFAR-10 ResNet-18's where none were published."""
    if architecture.lower().startswith(("vit", "deit")):
        return PaperRecipe(expert_lr=1e-6, auxiliary_lr=3.5e-4, expert_batch=256, auxiliary_batch=256)
    if architecture.startswith("vgg16_bn"):
        return PaperRecipe(expert_lr=8e-5, auxiliary_lr=0.2, c=0.4)
    if architecture.lower().startswith(("mobilenet_v2", "mobilenetv2")):
        return PaperRecipe(expert_lr=5e-5, auxiliary_lr=0.2, c=0.2)
    if size > 64:
        return PaperRecipe(auxiliary_lr=0.05, expert_batch=256, auxiliary_batch=256)
    return PaperRecipe()


@dataclass(frozen=True)
class AutoRecipe:
    """Constants of the `auto` preset; what depends on the suspect is found on held-back images and by canaries."""

    tail_share: float = 0.1  # the experts train only the last tenth of the network: "last block only" of a ResNet-20
    distance_shares: tuple[float, ...] = (0.2,)  # distances are measured with so much of the network behind, where the experts begin, and at its end
    asked: float = 0.03  # least share of clean images that the cheap evidence finds suspicious enough to ask the auxiliary
    experts: int = 2  # one random derangement is a gamble, the geometric mean of two is less of one; a third catches 0.4 points more at most (decision 1)
    expert_lrs: tuple[float, ...] = (3e-4, 1e-4, 3e-5)  # the first that does not diverge
    expert_stop: float = 0.2  # stop an expert when its held-back clean accuracy has fallen to this ...
    expert_forgets: float = 0.2  # ... and not before it has lost so much, or half of what there was: who knew little has forgotten nothing at 0.2
    expert_batch: int = 128
    expert_steps: int = 600  # give up then: some suspects forget slowly
    auxiliary_lr: float = 0.1  # where to begin, unless canaries say otherwise
    auxiliary_lrs: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)  # of these the hottest that keeps the task
    auxiliary_keep: float = 0.75  # share of the suspect's held-back accuracy that counts as keeping it
    auxiliary_hopeless: float = 0.5  # share of that which it must have before the coldest part of its training
    auxiliary_batch: int = 64
    auxiliary_epochs: int = 6  # of the published ten the last four, at 1e-4 and 1e-5, change nothing that is seen
    auxiliary_steps: tuple[int, ...] = (2, 4)
    auxiliary_decay: float = 0.1
    canary_lrs: tuple[float, ...] = (0.05, 0.01, 0.002)  # the first that leaves the copy its task
    canary_keep: float = 0.75  # share of the suspect's held-back accuracy that counts as keeping it
    canary_batch: int = 64
    canary_epochs: int = 8
    canary_rate: float = 0.08  # of each trigger, as a share of the clean images beside it
    c: float = 0.5
    held_back: float = 0.15  # share of the fit part


ASKED_FOR_EACH_REJECTED = 3.0


def auto_recipe(target_fpr: float) -> AutoRecipe:
    """The constants for a target: the auxiliary is asked about three times as many clean images as are to be rejected, and at least about three in a hundred.

    With fewer it could not tell which of the suspicious ones are to be rejected.
    """
    return AutoRecipe(asked=max(AutoRecipe.asked, ASKED_FOR_EACH_REJECTED * target_fpr))
