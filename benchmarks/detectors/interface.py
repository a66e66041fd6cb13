"""What a detector is: fitted on the part of a clean set that calibrates, it scores images; low scores are suspicious, as for our guard."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from calibration.finetune import LabelledPixels, precision
from models.preprocessing import Preprocessing


class NotApplicable(Exception):
    """The detector needs something that this suspect does not have."""


@dataclass(frozen=True)
class Observed:
    """The suspect as every detector sees it: a network in eval mode that takes uint8 pixels [N, 3, size, size]."""

    network: nn.Module
    preprocessing: Preprocessing
    num_classes: int
    architecture: str

    @torch.inference_mode()
    def logits(self, pixels: Tensor) -> Tensor:
        """float32 [N, C], in the device's fast precision: what perturbs an image many times would take minutes otherwise."""
        return self.answers(self.preprocessing.normalise(pixels))

    @torch.inference_mode()
    def answers(self, inputs: Tensor) -> Tensor:
        """The same for normalised inputs."""
        size = 512 if inputs.device.type == "cuda" else 64  # larger ones leave a CPU's cache and have their memory mapped anew each time
        with precision(inputs.device):
            return torch.cat([self.network(part.contiguous(memory_format=torch.channels_last)) for part in inputs.split(size)]).float()


class Detector(ABC):
    """One way to tell triggered images from clean ones."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    passes: float  # forward passes of the suspect's size an image costs, its own prediction included
    repeats: float = 0.02  # how near its AUROC comes to the recorded one on another processor, which rounds differently

    @abstractmethod
    def fit(self, suspect: Observed, clean: LabelledPixels, validation: LabelledPixels, seed: int) -> dict[str, Any]:
        """Calibrate on clean images; what was found is for the record. The validation part sets thresholds and must decide nothing else.

        Raises NotApplicable.
        """

    @abstractmethod
    def score(self, pixels: Tensor) -> Tensor:
        """float64 [N] on the CPU, of uint8 pixels [N, 3, size, size]."""
