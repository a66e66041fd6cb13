"""IBD-PSC (Hou et al. 2024, "IBD-PSC: Input-level Backdoor Detection via Parameter-oriented Scaling Consistency").

Weights and biases of the last batch norms are multiplied by 1.5, of a few more in each of five copies. Backdoored predictions stay sure, clean ones do not.
How many norms to begin with is found on clean images: as many as it takes for the error to pass 60%.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.detectors.interface import Detector, NotApplicable, Observed
from calibration.finetune import LabelledPixels
from models.score import log_confidence

COPIES, FACTOR, ERROR = 5, 1.5, 0.6


class IbdPsc(Detector):
    """The scaled copies' mean doubt about the suspect's prediction, as a logarithm: their confidence often rounds to 1."""

    name, title, paper = "ibd_psc", "IBD-PSC", "Hou et al. 2024"
    passes = 1 + COPIES

    def fit(self, suspect: Observed, clean: LabelledPixels, validation: LabelledPixels, seed: int) -> dict[str, Any]:
        norms = [name for name, module in suspect.network.named_modules() if isinstance(module, nn.BatchNorm2d)]
        if len(norms) < COPIES:
            raise NotApplicable("it scales batch norms, and the suspect has fewer than five")
        self.suspect, first = suspect, len(norms) - COPIES + 1
        for count in range(1, first + 1):
            error = (_scaled(suspect, norms[-count:]).logits(clean.pixels).argmax(1) != clean.labels).float().mean().item()
            if error > ERROR:
                first = count
                break
        self.copies = [_scaled(suspect, norms[-count:]) for count in range(first, first + COPIES)]
        return {"norms_scaled_first": first, "clean_error_then": round(error, 3)}

    def score(self, pixels: Tensor) -> Tensor:
        prediction = self.suspect.logits(pixels).argmax(1)
        doubts = [log_confidence(copied.logits(pixels), prediction)[1] for copied in self.copies]
        return torch.stack(doubts).logsumexp(0).cpu()


@torch.no_grad()
def _scaled(suspect: Observed, norms: list[str]) -> Observed:
    network = copy.deepcopy(suspect.network)
    for name in norms:
        norm = network.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.mul_(FACTOR)
        norm.bias.mul_(FACTOR)
    return Observed(network, suspect.preprocessing, suspect.num_classes, suspect.architecture)
