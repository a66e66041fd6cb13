"""The suspect, its backdoor experts and the auxiliary model as one module: predictions, confidences, scores.

With a cut, the experts are tails on the suspect's own trunk, which is computed once for all; without one, each is a whole network (the paper's
setting). Inputs are the uint8 pixels that `Preprocessing.pixels` makes; normalisation happens here, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.preprocessing import Preprocessing
from models.score import geometric_mean, log_confidence, score
from models.trunk import split


@dataclass(frozen=True)
class Judgement:
    """What the guard computed for N images."""

    prediction: Tensor  # int64 [N], the suspect's class
    confidence: Tensor  # float32 [N], the suspect's softmax of it
    expert: Tensor  # float64 [N], x: the experts' confidence in it
    auxiliary: Tensor  # float64 [N], y: the auxiliary's
    score: Tensor  # float64 [N], log s

    def cpu(self) -> Judgement:
        return Judgement(*(value.cpu() for value in (self.prediction, self.confidence, self.expert, self.auxiliary, self.score)))


class Guard(nn.Module):
    """Judges images; holds no threshold, so that the target FPR can change without touching weights."""

    def __init__(self, suspect: nn.Module, experts: Sequence[nn.Module], auxiliary: nn.Module, preprocessing: Preprocessing, cut: str | None, c: float) -> None:
        super().__init__()
        self.suspect, self.experts, self.auxiliary = suspect, nn.ModuleList(experts), auxiliary
        whole: tuple[nn.Module, nn.Module] = (nn.Identity(), suspect)
        self.trunk, self.tail = whole if cut is None else split(suspect, cut)
        self.preprocessing, self.cut, self.c = preprocessing, cut, c
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Judgement:
        """pixels: uint8 [N, 3, size, size]."""
        inputs = self.preprocessing.normalise(pixels)
        features = self.trunk(inputs)
        logits = self.tail(features)  # [N, C], exactly the suspect's own
        confidence, prediction = logits.float().softmax(-1).max(-1)
        expert_logits = torch.stack([expert(features) for expert in self.experts])  # [K, N, C]
        log_x, log_not_x = geometric_mean(*log_confidence(expert_logits, prediction))
        log_y, _ = log_confidence(self.auxiliary(inputs), prediction)
        return Judgement(prediction, confidence, log_x.exp(), log_y.exp(), score(log_x, log_not_x, log_y, self.c))

    def judge(self, pixels: Tensor, batch: int = 256) -> Judgement:
        """The same for any number of images, batch by batch, with the results on the CPU."""
        device = next(self.suspect.parameters()).device
        parts = [self(part.to(device)).cpu() for part in pixels.split(batch)]
        return Judgement(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))
