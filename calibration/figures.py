"""How good a detector is: from the scores of clean and of triggered images, and thresholds that other clean images set.

Figures count every image, but for those called `masked`, which are what the paper reports: of clean images that the suspect gets right, and of triggered ones
that fool it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from models.threshold import conformal_threshold


@dataclass(frozen=True)
class Scored:
    """Images of one kind as suspect and detector see them.

    score: float64 [N], low is suspicious. prediction: int64 [N], the suspect's. wanted: int64 [N], the true label of clean images, the attacker's of
    triggered ones.
    """

    score: Tensor
    prediction: Tensor
    wanted: Tensor

    @property
    def as_wanted(self) -> Tensor:
        """Clean images that the suspect gets right, or triggered ones that fool it; bool [N]."""
        return self.prediction == self.wanted


def figures(clean: Scored, triggered: Scored, validation: Tensor, targets: tuple[float, ...] = (0.01, 0.05)) -> dict[str, Any]:
    """Everything that is reported of one detector on one suspect; `validation` are scores of clean images that are not among those reported."""
    right, fooled = clean.as_wanted, triggered.as_wanted
    return {
        "clean_images": len(clean.score),
        "triggered_images": len(triggered.score),
        "validation_images": len(validation),
        "clean_accuracy": share(right),
        "asr": share(fooled),
        "auroc": auroc(clean.score, triggered.score),
        "auroc_masked": auroc(clean.score[right], triggered.score[fooled]),
        "at": {f"{target:g}": _at(clean, triggered, validation, target) for target in targets},
    }


def _at(clean: Scored, triggered: Scored, validation: Tensor, target: float) -> dict[str, Any]:
    threshold = conformal_threshold(validation, target)
    rejected, caught = (threshold.rejects(each.score) for each in (clean, triggered))
    right, fooled = clean.as_wanted, triggered.as_wanted
    return {
        "tpr": share(caught),
        "tpr_masked": share(caught[fooled]),
        "realised_fpr": share(rejected),
        "realised_fpr_masked": share(rejected[right]),
        "promised_interval": [round(bound, 5) for bound in threshold.interval],
        "remaining_asr": share(fooled & ~caught),
        "accuracy_lost": share(right & rejected),
    }


def share(values: Tensor) -> float | None:
    """Mean of a bool tensor; None where it is empty."""
    return round(values.double().mean().item(), 4) if len(values) else None


def auroc(clean: Tensor, triggered: Tensor) -> float | None:
    """Probability that a triggered image scores below a clean one, ties counting half (Mann and Whitney 1947); None where one kind is missing."""
    if not len(clean) or not len(triggered):
        return None
    ranks = torch.from_numpy(rankdata(torch.cat([triggered, clean]).numpy()))
    below = ranks[len(triggered) :].sum().item() - len(clean) * (len(clean) + 1) / 2
    return round(below / (len(clean) * len(triggered)), 5)


def roc(clean: Tensor, triggered: Tensor, rates: tuple[float, ...]) -> dict[str, list[float | None]]:
    """TPR where the threshold rejects just these shares of the reported clean images: for plots, not for promises."""
    ordered = clean.sort().values
    return {"fpr": list(rates), "tpr": [share(triggered < ordered[min(len(ordered) - 1, int(rate * len(ordered)))]) for rate in rates]}
