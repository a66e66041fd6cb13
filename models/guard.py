"""The suspect, its backdoor experts and the auxiliary model as one module: predictions, confidences, scores.

With a cut, the experts are tails on the suspect's own trunk, which is computed once for all; without one, each is a whole network (the paper's
setting). Inputs are the uint8 pixels that `Preprocessing.pixels` makes; normalisation happens here, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.distance import Distance, fit_distance, penultimate
from models.preprocessing import Preprocessing
from models.score import Scale, fused_score, geometric_mean, log_confidence, measure_scale, published_score
from models.trunk import split


@dataclass(frozen=True)
class Cuts:
    """Where the suspect is cut: the experts begin behind `experts`; `features` are what its head reads."""

    experts: str
    features: str


@dataclass(frozen=True)
class Fusion:
    """What the fused score needs beyond the networks: the feature distance, and the scale of each kind of evidence on clean images."""

    distance: Distance
    scales: tuple[Scale, Scale, Scale]  # of logit x, -logit y and the distance


@dataclass(frozen=True)
class Evidence:
    """What the networks say of N images; x and y are the experts' and the auxiliary's confidence in the suspect's prediction."""

    prediction: Tensor  # int64 [N]
    confidence: Tensor  # float32 [N]
    log_x: Tensor  # float64 [N], and so the next three
    log_not_x: Tensor
    log_y: Tensor
    log_not_y: Tensor
    features: Tensor  # float32 [N, D], what the head reads; the input itself where there are no cuts

    @property
    def expert(self) -> Tensor:
        """logit x: large where the expert agrees."""
        return self.log_x - self.log_not_x

    @property
    def auxiliary(self) -> Tensor:
        """-logit y: large where the auxiliary disagrees."""
        return self.log_not_y - self.log_y


@dataclass(frozen=True)
class Judgement:
    """What the guard computed for N images."""

    prediction: Tensor  # int64 [N], the suspect's class
    confidence: Tensor  # float32 [N], the suspect's softmax of it
    expert: Tensor  # float64 [N], x: the experts' confidence in it
    auxiliary: Tensor  # float64 [N], y: the auxiliary's
    distance: Tensor  # float64 [N], of the features to that class's; 0 where the score does not use it
    score: Tensor  # float64 [N]

    def cpu(self) -> Judgement:
        return Judgement(**{name: value.cpu() for name, value in vars(self).items()})


class Guard(nn.Module):
    """Judges images; holds no threshold, so that the target FPR can change without touching weights.

    With `cuts` and `fusion` the score is the fused one, without them the published one. c is the published score's constant.
    """

    def __init__(
        self,
        suspect: nn.Module,
        experts: Sequence[nn.Module],
        auxiliary: nn.Module,
        preprocessing: Preprocessing,
        *,
        cuts: Cuts | None = None,
        fusion: Fusion | None = None,
        c: float = 0.5,
    ) -> None:
        super().__init__()
        self.suspect, self.experts, self.auxiliary = suspect, nn.ModuleList(experts), auxiliary
        # Up to where the experts begin, up to the head, the head: the suspect's own modules, so that nothing is stored or moved twice.
        self.parts = nn.ModuleList([nn.Identity(), nn.Identity(), suspect] if cuts is None else split(suspect, cuts.experts, cuts.features))
        self.distance = fusion.distance if fusion is not None else None
        self.preprocessing, self.cuts, self.fusion, self.c = preprocessing, cuts, fusion, c
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, pixels: Tensor) -> Judgement:
        """pixels: uint8 [N, 3, size, size]."""
        found = self.evidence(pixels)
        if self.fusion is None:
            distance, score = torch.zeros_like(found.log_y), published_score(found.log_x, found.log_not_x, found.log_y, self.c)
        else:
            distance = self.fusion.distance(found.features, found.prediction)
            score = fused_score((found.expert, found.auxiliary, distance), self.fusion.scales)
        return Judgement(found.prediction, found.confidence, found.log_x.exp(), found.log_y.exp(), distance, score)

    @torch.inference_mode()
    def evidence(self, pixels: Tensor) -> Evidence:
        """What the networks say of uint8 pixels [N, 3, size, size], before it is made into a score."""
        trunk, body, head = self.parts
        inputs = self.preprocessing.normalise(pixels)
        shared = trunk(inputs)
        features = body(shared)
        logits = head(features)  # [N, C], exactly the suspect's own
        confidence, prediction = logits.float().softmax(-1).max(-1)
        expert_logits = torch.stack([expert(shared) for expert in self.experts])  # [K, N, C]
        log_x, log_not_x = geometric_mean(*log_confidence(expert_logits, prediction))
        log_y, log_not_y = log_confidence(self.auxiliary(inputs), prediction)
        return Evidence(prediction, confidence, log_x, log_not_x, log_y, log_not_y, penultimate(features))

    @torch.inference_mode()
    def features(self, pixels: Tensor) -> Tensor:
        """What the suspect's head reads, float32 [N, D]."""
        return penultimate(self.parts[1](self.parts[0](self.preprocessing.normalise(pixels))))

    def judge(self, pixels: Tensor, batch: int = 256) -> Judgement:
        """The same for any number of images, batch by batch, with the results on the CPU."""
        device = next(self.suspect.parameters()).device
        parts = [self(part.to(device)).cpu() for part in pixels.split(batch)]
        return Judgement(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


@torch.inference_mode()
def fuse(guard: Guard, fit: Tensor, labels: Tensor, held_back: Tensor, num_classes: int) -> Guard:
    """The same guard with the fused score: its distance fitted to clean pixels `fit` with true labels, its scales measured on `held_back`.

    The scales come from images that trained nothing, so that no kind of evidence looks better than it will be.
    """
    device = next(guard.suspect.parameters()).device
    features = torch.cat([guard.features(part.to(device)) for part in fit.split(256)])
    distance = fit_distance(features, labels, num_classes).to(device)
    found = [guard.evidence(part.to(device)) for part in held_back.split(256)]
    kinds = (
        torch.cat([part.expert for part in found]),
        torch.cat([part.auxiliary for part in found]),
        torch.cat([distance(part.features, part.prediction) for part in found]),
    )
    first, second, third = (measure_scale(values) for values in kinds)
    fusion = Fusion(distance, (first, second, third))
    return Guard(guard.suspect, list(guard.experts), guard.auxiliary, guard.preprocessing, cuts=guard.cuts, fusion=fusion, c=guard.c)
