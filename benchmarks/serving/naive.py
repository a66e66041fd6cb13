"""The guard that others would write: three whole networks for every image, as they were trained, and the published score."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from models.preprocessing import Preprocessing
from models.score import log_confidence, published_score


class Naive(nn.Module):
    """Copies of a suspect stand for expert and auxiliary: their work is the same."""

    def __init__(self, suspect: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.suspect, self.expert, self.auxiliary = suspect, copy.deepcopy(suspect), copy.deepcopy(suspect)
        self.preprocessing = preprocessing

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prediction, confidence and log score of pixels, uint8 [N, 3, size, size]."""
        inputs = self.preprocessing.normalise(pixels)
        confidence, prediction = self.suspect(inputs).float().softmax(-1).max(-1)
        log_x, log_not_x = log_confidence(self.expert(inputs), prediction)
        log_y, _ = log_confidence(self.auxiliary(inputs), prediction)
        return prediction, confidence, published_score(log_x, log_not_x, log_y, 0.5)
