"""Disjoint parts of a clean set: fit, held back, validation. Stratified by class, seeded; (near-)duplicates stay on one side."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.finetune import generator
from models.errors import FprUnreachable

Rows = NDArray[np.int64]
VALIDATION_SHARE, LARGEST_VALIDATION_SHARE = 0.4, 0.6


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

    Validation gets 40%, or what the target needs where that is more, up to 60%. Raises FprUnreachable beyond.
    """
    needed = math.ceil(1 / target_fpr - 1e-9) - 1
    most = math.floor(LARGEST_VALIDATION_SHARE * len(labels))
    if needed > most:
        raise FprUnreachable(
            f"A clean set of {len(labels)} images cannot promise a false-rejection rate of {target_fpr:g}: {needed} are needed for validation alone. "
            f"The least it can promise is {1 / (most + 1):.3g}; for {target_fpr:g} bring at least {math.ceil(needed / LARGEST_VALIDATION_SHARE)}."
        )
    # Whole groups may bring a few more than asked for, never fewer.
    validation, rest = _take(np.arange(len(labels)), labels, groups, max(round(VALIDATION_SHARE * len(labels)), needed), seed, "validation")
    fit, back = hold_back(rest, labels, groups, held_back, seed)
    return Parts(fit, back, validation)


def hold_back(rows: Rows, labels: Rows, groups: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """(fit, held back): a stratified share of `rows`, int64 [M], set aside."""
    back, fit = _take(rows, labels, groups, round(share * len(rows)), seed, "held back")
    return fit, back


def sample(rows: Rows, labels: Rows, groups: Rows, share: float, seed: int) -> Rows:
    """A stratified share of `rows`, int64 [M], at most 1; all of them where it is 1. Whole groups may make it a little less than asked for."""
    _, kept = _take(rows, labels, groups, len(rows) - round(share * len(rows)), seed, "sample")
    return kept


def _take(rows: Rows, labels: Rows, groups: Rows, count: int, seed: int, purpose: str) -> tuple[Rows, Rows]:
    """At least `count` of `rows` (none where it is 0), the same share of each class as near as whole groups allow, and the others."""
    if count == 0:
        return rows[:0], rows
    source = np.random.default_rng(generator(seed, "split", purpose).initial_seed())
    order = source.permutation(rows)
    # Within its class each image gets a place in [0, 1); the smallest places of all classes together are a stratified draw of exactly `count`.
    place = np.empty(len(order))
    for label in np.unique(labels[order]):
        of_class = np.flatnonzero(labels[order] == label)
        place[of_class] = (np.arange(len(of_class)) + source.random()) / len(of_class)
    chosen = order[np.argsort(place, kind="stable")[:count]]
    taken = np.isin(groups[rows], groups[chosen])
    return np.sort(rows[taken]), np.sort(rows[~taken])
