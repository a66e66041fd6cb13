"""The suspect, its backdoor experts and the auxiliary model as one module: predictions, confidences, scores.

With cuts, the experts are tails on the suspect's own trunk, which is computed once for all, the distances are those of features that it computes anyway,
and the auxiliary runs only for the images that these find suspicious; without, each is a whole network that sees every image (the paper's setting).
Inputs are the uint8 pixels that `Preprocessing.pixels` makes; normalisation happens here, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.distance import Distance, vectors
from models.lowering import dtype_of, folded
from models.preprocessing import Preprocessing
from models.score import Scale, geometric_mean, log_confidence, mean_place, published_score, surprise
from models.trunk import split


@dataclass(frozen=True)
class Cuts:
    """Where the suspect is cut: the experts begin behind `experts`, and distances are measured at `places`, in the order of flow."""

    experts: str  # one of the places, or before all of them
    places: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        """In the order of flow."""
        return self.places if self.experts in self.places else (self.experts, *self.places)


@dataclass(frozen=True)
class Scales:
    """Of each kind of evidence on clean images, and how suspicious an image has to be for the auxiliary to be asked."""

    expert: Scale  # of logit x
    distances: tuple[Scale, ...]  # at each place
    auxiliary: Scale  # of -logit y
    gate: float  # the least surprise of the first two kinds


@dataclass(frozen=True)
class Fusion:
    """What the fused score needs beyond the networks."""

    distances: Sequence[Distance]
    scales: Scales


@dataclass(frozen=True)
class Evidence:
    """What the suspect and its experts say of N images."""

    prediction: Tensor  # int64 [N]
    confidence: Tensor  # float32 [N]
    log_x: Tensor  # float64 [N], of the experts' confidence in the prediction
    log_not_x: Tensor  # float64 [N]
    features: tuple[Tensor, ...]  # float32 [N, D] for each place
    shared: Tensor  # [N, ...], what the experts read

    @property
    def expert(self) -> Tensor:
        """logit x: large where the expert agrees."""
        return self.log_x - self.log_not_x


def cheap_surprise(found: Evidence, distances: Iterable[nn.Module], scales: Scales) -> Tensor:
    """What the suspect's own features and the experts say, float64 [N]; large is suspicious."""
    places = zip(scales.distances, distances, found.features, strict=True)
    z = [scale.z(distance(features, found.prediction)) for scale, distance, features in places]
    return surprise(scales.expert.z(found.expert), mean_place(torch.stack(z)))


@dataclass(frozen=True)
class Judgement:
    """What the guard computed for N images."""

    prediction: Tensor  # int64 [N], the suspect's class
    confidence: Tensor  # float32 [N], the suspect's softmax of it
    expert: Tensor  # float64 [N], x: the experts' confidence in it
    auxiliary: Tensor  # float64 [N], y: the auxiliary's; NaN for an image that did not reach the gate
    score: Tensor  # float64 [N]

    def cpu(self) -> Judgement:
        return Judgement(**{name: value.cpu() for name, value in vars(self).items()})


class Seen(NamedTuple):
    """What is known of N images before the auxiliary is asked, as plain tensors."""

    inputs: Tensor  # [N, 3, size, size], normalised
    prediction: Tensor  # int64 [N]
    confidence: Tensor  # float32 [N]
    log_x: Tensor  # float64 [N]
    log_not_x: Tensor  # float64 [N]
    cheap: Tensor  # float64 [N], the surprise so far; 0 for the published score


def gated(look: Callable[[Tensor], Seen], ask: Callable[[Seen], tuple[Tensor, Tensor]], gate: float, pixels: Tensor, ungated: bool) -> Judgement:
    """Look at all images, and ask the auxiliary about those that the look finds suspicious."""
    seen = look(pixels)
    suspicious = seen.cheap >= gate
    y, score = torch.full_like(seen.cheap, math.nan), -seen.cheap
    asked = (suspicious | ungated).nonzero().squeeze(1)
    if len(asked):
        log_y, complete = ask(Seen(*(each[asked] for each in seen)))
        y[asked], score[asked] = log_y.exp(), torch.where(suspicious[asked], complete, score[asked])
    return Judgement(seen.prediction, seen.confidence, seen.log_x.exp(), y, score)


def fed(network: nn.Module, inputs: Tensor) -> Tensor:
    """What a network gives for inputs, which it gets in its own precision."""
    outputs: Tensor = network(inputs.to(dtype_of(network)))
    return outputs


class Guard(nn.Module):
    """Judges images; holds no threshold, so that the target FPR can change without touching weights.

    With `cuts` and `fusion` the score is the fused one, without them the published one. c is the published score's constant. The suspect answers in
    float32, as it would alone; experts and auxiliary run in whatever precision their weights have.
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
        # From place to place, and the head. What serves runs these alone, without the suspect as it was (`models.program.serving`).
        self.parts = nn.ModuleList(folded(part) for part in ([suspect] if cuts is None else split(suspect, *cuts.all)))
        self.distances = nn.ModuleList([] if fusion is None else fusion.distances)
        self.scales = None if fusion is None else fusion.scales
        self.preprocessing, self.cuts, self.c = preprocessing, cuts, c
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(self, pixels: Tensor, ungated: bool = False) -> Judgement:
        """pixels: uint8 [N, 3, size, size]. ungated: ask the auxiliary about all images, for whoever wants to see y; the score is the same."""
        return gated(self.look, self.ask, self.gate, pixels, ungated)

    @property
    def gate(self) -> float:
        """How suspicious an image has to be for the auxiliary to be asked; without scales every image is."""
        return -math.inf if self.scales is None else self.scales.gate

    def look(self, pixels: Tensor) -> Seen:
        """What suspect and experts say of pixels, uint8 [N, 3, size, size]."""
        return self.weigh(*self.flow(self.preprocessing.normalise(pixels)))

    def flow(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Normalised inputs, what the suspect makes of them at each of its cuts, and its logits: all that it computes alone."""
        values = [inputs]
        for part in self.parts:
            values.append(part(values[-1]))
        return tuple(values)

    def weigh(self, inputs: Tensor, *values: Tensor) -> Seen:
        """What suspect and experts say, from what `flow` gives."""
        found = self._from(inputs, *values)
        cheap = torch.zeros_like(found.log_x) if self.scales is None else cheap_surprise(found, self.distances, self.scales)
        return Seen(inputs, found.prediction, found.confidence, found.log_x, found.log_not_x, cheap)

    def ask(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """The auxiliary's log y, and the score with it; both float64 [N]."""
        log_y, log_not_y = log_confidence(fed(self.auxiliary, seen.inputs), seen.prediction)
        if self.scales is None:
            return log_y, published_score(seen.log_x, seen.log_not_x, log_y, self.c)
        return log_y, -(seen.cheap + surprise(self.scales.auxiliary.z(log_not_y - log_y)))

    def evidence(self, inputs: Tensor) -> Evidence:
        """What suspect and experts say of normalised inputs [N, 3, size, size], before it is made into a score."""
        return self._from(*self.flow(inputs))

    def _from(self, inputs: Tensor, *values: Tensor) -> Evidence:
        *between, logits = values  # [N, C], exactly the suspect's own
        at = dict(zip(() if self.cuts is None else self.cuts.all, between, strict=True))
        shared = inputs if self.cuts is None else at[self.cuts.experts]
        features = tuple(vectors(at[place]) for place in (() if self.cuts is None else self.cuts.places))
        confidence, prediction = logits.float().softmax(-1).max(-1)
        expert_logits = torch.stack([fed(expert, shared) for expert in self.experts])  # [K, N, C]
        return Evidence(prediction, confidence, *geometric_mean(*log_confidence(expert_logits, prediction)), features, shared)

    def judge(self, pixels: Tensor, batch: int = 256, ungated: bool = False) -> Judgement:
        """The same for any number of images, batch by batch, with the results on the CPU."""
        device = next(self.parameters()).device
        parts = [self(part.to(device), ungated).cpu() for part in pixels.split(batch)]
        return Judgement(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})
