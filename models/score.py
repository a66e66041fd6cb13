"""The score: the paper's formula (BaDExpert, ICLR 2024, section 3.3), on one screen.

For an image with the suspect's prediction p, let x = softmax(B)[p] be the backdoor expert's confidence and y = softmax(M')[p] the auxiliary's:

    s = min( y / (c x), (1 - x) / (c - y) )        the second term only where y < c

Low means backdoor: the expert still agrees, the auxiliary no longer does. All of it is computed in log space and float64, since in float32 a
saturated expert makes 1 - x, and with it the score, 0 for a perfectly clean image. `published_score` is log s, and its threshold log alpha: the same
order, no overflow.

The minimum lets the weaker of the two networks hide what the stronger one saw. The fused score adds evidence up instead. Each kind is measured against
clean images and contributes about -log of the share of those that are as suspicious:

    surprise = log(1 + exp(z)),  z = (value - median) / (mean excess over the median)

which is what the upper tail of a logistic distribution gives: it goes on growing beyond the last clean image, and no clean-looking piece of evidence
cancels another that is alarming. There are three kinds: logit x; the distance of the suspect's own features from those of the predicted class, in units of
what is usual for that class; and the auxiliary's doubt. Where a kind is measured in several ways, exp(z) is averaged over them, so that one is enough and the
others add no noise: the distance at several places, the doubt as -logit y and as logit m - logit y, with m = softmax(M)[p] the suspect's own confidence. For
the auxiliary parts with the suspect also where the suspect errs; but there the suspect is seldom sure, and of a backdoor it mostly is.

    score = - surprise(logit x) - surprise(log mean exp z of the distances)
            - [the first two reach the gate] surprise(log mean exp z of the doubt)

What the first two say costs next to nothing. Behind the gate lie the few clean images that they find most suspicious, three times as many as may be
rejected, and at least 3%; all others score better than any of these, and for them the auxiliary never runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus


def log_confidence(logits: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """log x and log (1 - x), float64 [..., N], for x = softmax(logits)[prediction]; logits [..., N, C], prediction int64 [N]."""
    logits = logits.double()
    chosen = prediction.expand(logits.shape[:-1]).unsqueeze(-1)  # [..., N, 1]
    everything = logits.logsumexp(-1)  # [..., N]
    others = logits.scatter(-1, chosen, -math.inf).logsumexp(-1)
    return logits.gather(-1, chosen).squeeze(-1) - everything, others - everything


def geometric_mean(log_x: Tensor, log_not_x: Tensor) -> tuple[Tensor, Tensor]:
    """log x and log (1 - x) of the geometric mean of K experts' x; both [K, N] -> [N]. One expert passes through unchanged.

    -log x = -log1p(-(1 - x)) is 1 - x itself where that is tiny, which keeps log (1 - x) finite where x rounds to 1. Where x is large it is taken from
    1 - x, since log x is then a small difference of two logits that may be large.
    """
    if len(log_x) == 1:
        return log_x[0], log_not_x[0]
    minus_log_x = torch.where(log_not_x < -math.log(2), -torch.log1p(-log_not_x.exp()), -log_x)
    log_of_minus_log_x = torch.where(log_not_x < -30, log_not_x, torch.log(minus_log_x))
    log_a = log_of_minus_log_x.logsumexp(0) - math.log(len(log_x))  # a = -log of the mean
    return log_x.mean(0), torch.where(log_a < -30, log_a, torch.log(-torch.expm1(-log_a.exp())))


def shortfall(logits: Tensor, prediction: Tensor, log_y: Tensor, log_not_y: Tensor) -> Tensor:
    """logit m - logit y, float64 [N]; logits of the suspect, [N, C]. By way of logarithms, since a confidence of 1 has no logit."""
    log_m, log_not_m = log_confidence(logits, prediction)
    return (log_m - log_not_m) - (log_y - log_not_y)


def published_score(log_x: Tensor, log_not_x: Tensor, log_y: Tensor, c: float) -> Tensor:
    """log s, float64 [N]."""
    first = log_y - math.log(c) - log_x
    below = c - log_y.exp()  # c - y; the second term counts only where this is positive
    second = log_not_x - below.clamp(min=torch.finfo(torch.float64).tiny).log()
    return torch.where(below > 0, torch.minimum(first, second), first)


@dataclass(frozen=True)
class Scale:
    """Where one measurement of evidence lies for clean images: its median, and how far beyond it the upper half is on average."""

    median: float
    excess: float

    def z(self, values: Tensor) -> Tensor:
        """How suspicious values are, in units of this scale."""
        return (values - self.median) / self.excess


def measure_scale(values: Tensor) -> Scale:
    """The scale of a measurement (large is suspicious), from its values on clean images, float64 [N]."""
    median = values.median()
    above = values[values > median]
    excess = (above - median).mean().item() if len(above) else 0.0
    return Scale(median.item(), max(excess, 1e-6))  # evidence that is the same for all clean images must not divide by zero


def mean_exp(z: Tensor) -> Tensor:
    """log mean exp of what one kind of evidence, measured in K ways, says of N images, float64 [K, N] -> [N]."""
    return z.logsumexp(0) - math.log(len(z))


def surprise(*z: Tensor) -> Tensor:
    """Summed over kinds of evidence, float64 [N] each: at least 0, large is suspicious."""
    return sum((softplus(each) for each in z), torch.zeros(()))
