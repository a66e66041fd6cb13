"""What an attack is: a trigger, the images it is used on, and how it gets into a network.

An attack is a module that puts its trigger on images. What it learns (a generator, a patch) or draws from its seed (a warp, a picture) is in its
state dict, which is kept beside the suspect, so that the same trigger can be used later. Images are float [N, 3, H, W] in [0, 1], labels int64 [N].

It gets in by one or several of: `poison`, before training; `batch`, in each training step; `implant`, into finished weights. The defaults are those of
the commonest kind: a share of the images of all other classes is triggered and called the target class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from benchmarks.data import Split
from models.preprocessing import Preprocessing


@dataclass(frozen=True)
class Task:
    """What the suspect is trained for."""

    num_classes: int = 10
    size: int = 32
    target: int = 0


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, under a one-cycle schedule. An attack that has one of its own starts from weights that are already good."""

    epochs: int
    lr: float
    batch: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"


@dataclass(frozen=True)
class Batch:
    """What one training step sees; `penalty` is added to its loss."""

    images: Tensor
    labels: Tensor
    penalty: Tensor | float = 0.0


class Surrogate(nn.Module):
    """A clean network that takes images in [0, 1]."""

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(preprocessing, name))[:, None, None])

    def normalise(self, images: Tensor) -> Tensor:
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (images - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, C]."""
        logits: Tensor = self.network(self.normalise(images))
        return logits


class Attack(nn.Module, ABC):
    """One attack on one task. Parameters that require gradients are trained together with the network."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    kind: ClassVar[Literal["poisoning", "training", "weights"]] = "poisoning"
    rate: ClassVar[float] = 0.01  # share of the training images that is triggered
    fixed_rate: ClassVar[bool] = False  # the attack is no part of the data set: `batch` or `implant` puts it in
    needs_clean: ClassVar[bool] = False  # `prepare` is given a clean network of the same architecture
    recipe: ClassVar[Recipe | None] = None  # training starts from the clean network, with this recipe

    def __init__(self, task: Task, seed: int = 0) -> None:
        super().__init__()
        self.task, self.seed = task, seed

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """The images as the attacker sends them, of the same shape and range."""

    def eligible(self, labels: Tensor) -> Tensor:
        """Images that the attacker would use the trigger on, bool [N]: those whose class the attack would change."""
        return labels != self.task.target

    def relabel(self, labels: Tensor) -> Tensor:
        """What the attacker wants triggered images of these classes to be called."""
        return torch.full_like(labels, self.task.target)

    def prepare(self, data: Split, surrogate: Surrogate | None, source: torch.Generator) -> None:
        """Learn what the trigger needs, from the training data on the device that the attack is on; once, before everything else."""

    def poison(self, data: Split, rate: float, source: torch.Generator) -> Split:
        """The training data with the attack in it; uint8 images, as a poisoned data set would be stored."""
        if self.fixed_rate:
            return data
        return plant(data, draw(self.eligible(data.labels), rate, source), self, self.relabel)

    def batch(self, images: Tensor, labels: Tensor, source: torch.Generator) -> Batch:
        """A training batch with the attack in it."""
        return Batch(images, labels)

    def implant(self, network: nn.Module, data: Split, surrogate: Surrogate, source: torch.Generator) -> None:
        """Change a trained network in place; once, after everything else."""


def draw(eligible: Tensor, rate: float, source: torch.Generator) -> Tensor:
    """Rows for a poison rate, int64: drawn among the eligible ones (bool [N]), as many as `rate` of all. Raises ValueError where there are too few."""
    rows, count = eligible.nonzero().flatten().cpu(), round(rate * len(eligible))
    if count > len(rows):
        raise ValueError(f"{len(rows)} images can be poisoned, not the {count} that a rate of {rate} asks for")
    return rows[torch.randperm(len(rows), generator=source)[:count]]


def plant(data: Split, rows: Tensor, trigger: nn.Module | None = None, relabel: object = None) -> Split:
    """A copy of the data of which `rows` are triggered and relabelled."""
    images, labels = data.images.clone(), data.labels.clone()
    if trigger is not None:
        images[rows] = stamp(trigger, images[rows])
    if callable(relabel):
        labels[rows] = relabel(labels[rows])
    return Split(images, labels)


@torch.inference_mode()
def stamp(trigger: nn.Module, images: Tensor) -> Tensor:
    """Put a trigger on uint8 images [N, 3, H, W]; rounds as a saved picture would."""
    stamped = [(trigger(part.float() / 255) * 255).round().clamp(0, 255).to(torch.uint8) for part in images.split(500)]
    return torch.cat(stamped) if stamped else images.clone()


def uniform(source: torch.Generator, *shape: int) -> Tensor:
    """Float [shape] in [0, 1) from a generator on the CPU, so that a seed gives the same everywhere."""
    return torch.rand(*shape, generator=source)
