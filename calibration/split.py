"""Disjoint parts of a clean set: fit, held back, validation. Stratified by class, seeded; (near-)duplicates stay on one side."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.finetune import generator
from models.errors import FprUnreachable
from models.threshold import fuller_for, least_fpr, needed_for

Rows = NDArray[np.int64]
VALIDATION_SHARE, LARGEST_VALIDATION_SHARE = 0.4, 0.6
FEW_MORE = 0.02  # of the validation images, which are worth it where they bring the threshold to the next rank


@dataclass(frozen=True)
class Parts:
    """Row numbers of the clean set, ascending, no row in two parts."""

    fit: Rows  # trains the experts and the auxiliary
    held_back: Rows  # tells them when to stop; empty where nothing asks for it
    validation: Rows  # sets the threshold, and is seen by nothing else

    def __len__(self) -> int:
        return len(self.fit) + len(self.held_back) + len(self.validation)


def split(labels: Rows, groups: Rows, target_fpr: float, held_back: float, seed: int) -> Parts:
    """Divide a clean set; labels and groups are int64 [N], rows of one group are never divided.

    Validation gets 40%, and a few more where these let the threshold come nearer to the target, or what the target needs where that is more, up to 60%.
    Raises FprUnreachable beyond.
    """
    needed = needed_for(target_fpr)
    most = math.floor(LARGEST_VALIDATION_SHARE * len(labels))
    if needed > most:
        raise FprUnreachable(
            f"A clean set of {len(labels)} images cannot promise a false-rejection rate of {target_fpr:g}: {needed} are needed for validation alone. "
            f"The least it can promise is {least_fpr(most):g}; for {target_fpr:g} bring at least {math.ceil(needed / LARGEST_VALIDATION_SHARE)}."
        )
    # Groups that are all large may bring more than asked for, never fewer.
    usual = round(VALIDATION_SHARE * len(labels))
    fuller = fuller_for(target_fpr, usual)  # with 198 images 1% is half given away: a threshold of the first of them rejects 0.5%, of the second of 199 1%
    wanted = fuller if fuller <= (1 + FEW_MORE) * usual else usual
    validation, rest = _take(np.arange(len(labels)), labels, groups, max(wanted, needed), seed, "validation")
    fit, back = hold_back(rest, labels, groups, held_back, seed)
    return Parts(fit, back, validation)


def hold_back(rows: Rows, labels: Rows, groups: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """(fit, held back): a stratified share of `rows`, int64 [M], set aside."""
    back, fit = _take(rows, labels, groups, round(share * len(rows)), seed, "held back")
    return fit, back


def sample(rows: Rows, labels: Rows, share: float, seed: int) -> Rows:
    """A stratified share of `rows`, int64 [M], at most 1; all of them where it is 1. Of a group some may stay: it is in one part alone before and after."""
    _, kept = _take(rows, labels, np.arange(len(labels)), len(rows) - round(share * len(rows)), seed, "sample")
    return kept


def _take(rows: Rows, labels: Rows, groups: Rows, count: int, seed: int, purpose: str) -> tuple[Rows, Rows]:
    """At least `count` of `rows` (none where it is 0), the same share of each class as near as whole groups allow, and the others.

    Groups are drawn, not images: a group is as likely to be taken as an image that stands alone. One that would make too many is passed over; where all that
    are left would, the smallest makes more.
    """
    if count == 0:
        return rows[:0], rows
    source = np.random.default_rng(generator(seed, "split", purpose).initial_seed())
    position = source.permutation(rows).argsort()  # of each row, in a random order of all
    drawn, first, size = np.unique(groups[rows], return_index=True, return_counts=True)
    arranged = position[first].argsort()  # by one image of each, or large groups would come first
    drawn, label, size = drawn[arranged], labels[rows[first[arranged]]], size[arranged]
    # Within its class each group gets a place in [0, 1); the smallest places of all classes together are a stratified draw.
    place = np.empty(len(drawn))
    for each in np.unique(label):
        of_class = np.flatnonzero(label == each)
        place[of_class] = (size[of_class].cumsum() - size[of_class] + source.random() * size[of_class]) / size[of_class].sum()
    chosen, left, passed = list[int](), count, list[int]()
    for group in place.argsort(kind="stable").tolist():
        fits = size[group] <= left
        (chosen if fits else passed).append(group)
        left -= size[group] if fits else 0
    if left:
        chosen.append(min(passed, key=lambda group: int(size[group])))
    taken = np.isin(groups[rows], drawn[chosen])
    return np.sort(rows[taken]), np.sort(rows[~taken])
