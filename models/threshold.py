"""The threshold and what it promises: an order statistic of clean scores, and the distribution of the rate that it will realise.

For images without end the rate has the distribution Beta(rank, n + 1 - rank) (Vovk 2012); among a number of images, which is all that anybody can count, the
number of rejections is beta-binomial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.errors import FprUnreachable

if TYPE_CHECKING:  # plain arithmetic otherwise: who only reasons about promises need not import torch
    from torch import Tensor


ROUNDING = 1e-5  # by which scores of one image may differ, absolutely and relatively, between the programs that compute them
COUNTED = 1000  # images that the promised interval is about
MOST_FPR = 0.2  # that may be asked for
MOST_NEEDED = 10**12  # images: what a lower rate would take is not told more exactly


@dataclass(frozen=True)
class Threshold:
    """A threshold and what it promises.

    The `rank`-th smallest of `n` validation scores, less what rounding moves a score by: a clean image from the same source is then rejected with
    probability rank / (n + 1) at most, on average over validation sets; for the set at hand the share that it rejects of the next COUNTED of them lies in
    `interval` with probability 0.9, at least.
    """

    value: float
    target_fpr: float
    n: int
    rank: int
    interval: tuple[float, float]

    @property
    def expected(self) -> float:
        """The share of clean images that is rejected, on average over validation sets."""
        return self.rank / (self.n + 1)

    def rejects(self, scores: Tensor) -> Tensor:
        """Which of these are rejected, bool, in the shape of `scores`. What is no number is: nothing is known of such an image."""
        return ~(scores >= self.value)


def conformal_threshold(scores: Tensor, target_fpr: float) -> Threshold:
    """Of the floor(target (n + 1))-th smallest validation score; raises FprUnreachable where that is the zeroth."""
    n = len(scores)
    rank = _rank(target_fpr, n)
    if rank < 1:
        raise FprUnreachable(
            f"{n} validation images cannot promise a false-rejection rate of {target_fpr:g}; with them {least_fpr(n):g} is the least. "
            f"Ask for that, or bring at least {needed_for(target_fpr)} validation images."
        )
    few, many = _rejections(rank, n, COUNTED, 0.9)
    return Threshold(_just_below(scores.sort().values, rank), target_fpr, n, rank, (few / COUNTED, many / COUNTED))


def _just_below(ascending: Tensor, rank: int) -> float:
    """Under the score of this rank, that its own image is accepted whichever program computes it; halfway to the next lower score at most."""
    value = ascending[rank - 1].item()
    lower = ascending[ascending < value]
    room = (value - lower[-1].item()) / 2 if len(lower) else math.inf
    return value - min(ROUNDING * (1 + abs(value)), room)


def needed_for(target_fpr: float) -> int:
    """Validation images that it takes to promise a false-rejection rate; MOST_NEEDED where these are more."""
    return _images_for(1, target_fpr)


def fuller_for(target_fpr: float, n: int) -> int:
    """The least number of validation images from n on with which the threshold has a higher rank than with n - 1, and so gives nothing of the target away."""
    return _images_for(_rank(target_fpr, n - 1) + 1, target_fpr)


def _images_for(rank: int, target_fpr: float) -> int:
    return math.ceil(min(MOST_NEEDED + 1, rank / target_fpr) - 1e-9) - 1


def _rank(target_fpr: float, n: int) -> int:
    return math.floor(target_fpr * (n + 1) + 1e-9)  # 0.01 * 300 is a hair under 3 in binary


def least_fpr(n: int) -> float:
    """The least false-rejection rate that n validation images can promise, in three digits that can be asked for: rounded up."""
    digits = 2 - math.floor(math.log10(1 / (n + 1)))
    return math.ceil(10.0**digits / (n + 1)) / 10.0**digits


def rejections_expected(threshold: Threshold, images: int, level: float = 0.9) -> tuple[int, int]:
    """Among so many new clean images, between how many rejections lie with probability `level` (beta-binomial)."""
    return _rejections(threshold.rank, threshold.n, images, level)


def _rejections(rank: int, n: int, images: int, level: float) -> tuple[int, int]:
    a, b, total, found = rank, n + 1 - rank, 0.0, [0, images]
    tail = (1 - level) / 2
    for j in range(images + 1):
        total += math.exp(log_choose(images, j) + _log_beta(j + a, images - j + b) - _log_beta(a, b))
        if total <= tail:
            found[0] = j + 1
        if total >= 1 - tail:
            found[1] = j
            break
    return found[0], found[1]


def log_choose(n: int, k: int) -> float:
    """The logarithm of n! / (k! (n - k)!), for 0 <= k <= n."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
