"""The suspect, its backdoor experts and the auxiliary model as one module: predictions, confidences, scores.

With cuts, the experts are tails on the suspect's own trunk, which is computed once for all, the distances are those of features that it computes anyway,
and the auxiliary runs only for the images that these find suspicious. Without, each is a whole network (the paper's setting), and it is the experts that
are left out where the auxiliary alone proves that an image will be accepted.
Inputs are the uint8 pixels that `Preprocessing.pixels` makes; normalisation happens here, on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.distance import Distance, vectors
from models.lowering import dtype_of, folded
from models.preprocessing import Preprocessing
from models.score import Scale, geometric_mean, log_confidence, mean_exp, published_score, shortfall, surprise
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
    """Of each measurement on clean images, and how suspicious an image has to be for the auxiliary to be asked."""

    expert: Scale  # of logit x
    distances: tuple[Scale, ...]  # at each place
    auxiliary: Scale  # of -logit y
    shortfall: Scale | None  # of logit m - logit y; None in bundles of an older schema, which do not look at it
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
    logits: Tensor  # float32 [N, C], the suspect's
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
    return surprise(scales.expert.z(found.expert), mean_exp(torch.stack(z)))


@dataclass(frozen=True)
class Judgement:
    """What the guard computed for N images."""

    prediction: Tensor  # int64 [N], the suspect's class
    confidence: Tensor  # float32 [N], the suspect's softmax of it
    expert: Tensor  # float64 [N], x: the experts' confidence in it
    auxiliary: Tensor  # float64 [N], y: the auxiliary's; of x and y one is NaN for an image that did not reach the gate
    score: Tensor  # float64 [N]

    def cpu(self) -> Judgement:
        if self.score.is_cpu:  # each call to a tensor's own `cpu` would wait for the interpreter's lock
            return self
        return Judgement(**{name: value.cpu() for name, value in vars(self).items()})


class Seen(NamedTuple):
    """What is known of N images before the last network is asked, as plain tensors."""

    pixels: Tensor  # uint8 [N, 3, size, size]
    prediction: Tensor  # int64 [N]
    confidence: Tensor  # float32 [N]
    logits: Tensor  # float32 [N, C], the suspect's
    log_known: Tensor  # float64 [N], of x or y: of what is asked first
    log_not_known: Tensor  # float64 [N]
    cheap: Tensor  # float64 [N], how suspicious that looks


@dataclass(frozen=True)
class Order:
    """Which of experts and auxiliary is asked about every image, and how suspicious an image has to look for the other to be asked as well.

    The fused score looks at the experts first; what passes below the gate of its scales scores better than all that reach it, by definition.
    The published score of whole networks looks at the auxiliary first: where y > c, s = y / (c x) is above 1 whatever x is, and a threshold of at most 1
    accepts the image. Its score is then what it is at least, y / c.
    """

    experts_first: bool
    gate: float

    def at(self, threshold: float) -> float:
        """The gate with a threshold of log s; where nothing is proven, every image is to reach it."""
        return self.gate if self.experts_first or threshold <= 0 else -math.inf


class Gated(nn.Module):
    """Looks at all images, and asks the network that is left about those that the look finds suspicious.

    In words that TorchScript knows: compiled, with its two parts traced, it is a single call, and comes back to the Python interpreter once.
    """

    def __init__(self, look: Callable[[list[Tensor]], Any], ask: Callable[[list[Tensor]], Any], experts_first: bool) -> None:
        """look: from pixels, and what else it is given, to what `Seen` names; ask: from some of its rows to what `Guard.ask` gives."""
        super().__init__()
        self.look, self.ask, self.experts_first = look, ask, experts_first

    def forward(self, values: list[Tensor], gate: float, ungated: bool) -> list[Tensor]:
        """What `Judgement` names. values: of `look`; gate: of what it finds suspicious; ungated: ask about every image."""
        seen = self.look(values)
        _, prediction, confidence, _, log_known, _, cheap = seen
        suspicious = cheap >= gate
        other, score = torch.full_like(cheap, math.nan), -cheap
        asked = torch.nonzero(suspicious | ungated).squeeze(1)
        if len(asked) > 0:
            log_other, complete = self.ask([each[asked] for each in seen])
            other[asked] = log_other.exp()
            score[asked] = torch.where(suspicious[asked], complete, score[asked])
        known = log_known.exp()
        expert, auxiliary = (known, other) if self.experts_first else (other, known)
        return [prediction, confidence, expert, auxiliary, score]


def answer(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence, float32 [N], and predicted class, int64 [N]."""
    confidence, prediction = logits.float().softmax(-1).max(-1)
    return confidence, prediction


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
    def forward(self, pixels: Tensor, ungated: bool = False, threshold: float = math.inf) -> Judgement:
        """pixels: uint8 [N, 3, size, size]. ungated: ask every network about all images, for whoever wants to see x and y; the score is the same.

        threshold: of the score, where it is known. With one of at most 0, an image that the published score is sure to accept is scored no further.
        """
        order = self.order
        gated = Gated(lambda values: self.look(*values), lambda rows: self.ask(Seen(*rows)), order.experts_first)
        return Judgement(*gated([pixels], order.at(threshold), ungated))

    @property
    def order(self) -> Order:
        """In which the networks are asked."""
        if self.scales is not None:
            return Order(True, self.scales.gate)
        return Order(False, 0.0) if self.cuts is None else Order(True, -math.inf)

    def look(self, pixels: Tensor) -> Seen:
        """What the suspect and those that are asked first say of pixels, uint8 [N, 3, size, size]."""
        return self.weigh(pixels, *self.flow(self.preprocessing.normalise(pixels)))

    def flow(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """All that the suspect computes alone of normalised inputs: what the experts read, its features at each place, and its logits."""
        values = [inputs]
        for part in self.parts:
            values.append(part(values[-1]))
        logits = values.pop()  # [N, C], exactly the suspect's own
        if self.cuts is None:
            return inputs, logits
        at = dict(zip(self.cuts.all, values[1:], strict=True))
        return at[self.cuts.experts], *(vectors(at[place]) for place in self.cuts.places), logits

    def weigh(self, pixels: Tensor, *flow: Tensor) -> Seen:
        """What the suspect and those that are asked first say, from pixels and what `flow` gives."""
        if not self.order.experts_first:
            confidence, prediction = answer(flow[-1])
            log_y, log_not_y = self._ask_auxiliary(pixels, prediction)
            return Seen(pixels, prediction, confidence, flow[-1], log_y, log_not_y, math.log(self.c) - log_y)
        found = self._from(*flow)
        cheap = torch.zeros_like(found.log_x) if self.scales is None else cheap_surprise(found, self.distances, self.scales)
        return Seen(pixels, found.prediction, found.confidence, found.logits, found.log_x, found.log_not_x, cheap)

    def ask(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """What the network that is left says, log x or log y, and the score with it; both float64 [N]."""
        if not self.order.experts_first:
            log_x, log_not_x = self._ask_experts(self.preprocessing.normalise(seen.pixels), seen.prediction)
            return log_x, published_score(log_x, log_not_x, seen.log_known, self.c)
        log_y, log_not_y = self._ask_auxiliary(seen.pixels, seen.prediction)
        if self.scales is None:
            return log_y, published_score(seen.log_known, seen.log_not_known, log_y, self.c)
        z = [self.scales.auxiliary.z(log_not_y - log_y)]
        if self.scales.shortfall is not None:
            z.append(self.scales.shortfall.z(shortfall(seen.logits, seen.prediction, log_y, log_not_y)))
        return log_y, -(seen.cheap + surprise(mean_exp(torch.stack(z))))

    def evidence(self, inputs: Tensor) -> Evidence:
        """What suspect and experts say of normalised inputs [N, 3, size, size], before it is made into a score."""
        return self._from(*self.flow(inputs))

    def _from(self, shared: Tensor, *flow: Tensor) -> Evidence:
        *features, logits = flow
        confidence, prediction = answer(logits)
        return Evidence(prediction, confidence, logits, *self._ask_experts(shared, prediction), tuple(features), shared)

    def _ask_experts(self, shared: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.stack([fed(expert, shared) for expert in self.experts])  # [K, N, C]
        return geometric_mean(*log_confidence(logits, prediction))

    def _ask_auxiliary(self, pixels: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        return log_confidence(fed(self.auxiliary, self.preprocessing.normalise(pixels)), prediction)

    def judge(self, pixels: Tensor, batch: int = 256, ungated: bool = False) -> Judgement:
        """The same for any number of images, batch by batch, with the results on the CPU."""
        device = next(self.parameters()).device
        parts = [self(part.to(device), ungated).cpu() for part in pixels.split(batch)]
        return Judgement(**{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})
