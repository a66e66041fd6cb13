"""How good a detector is: from the scores of clean and of triggered images, and thresholds that other clean images set.

Figures count every image, but for those called `masked`, which are what the paper reports: of clean images that the suspect gets right, and of triggered ones
that fool it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from calibration.clean_set import Limits, open_clean_set
from models import bundle
from models.bundle import Bundle
from models.errors import CleanSetProblem, ConfigInvalid
from models.threshold import conformal_threshold, rejections_expected

CHUNK = 256  # images decoded at a time


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
    rejected, caught = (~(each.score >= threshold.value) for each in (clean, triggered))  # what has no finite score is rejected, too
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


def evaluate_guard(
    folder: Path,
    clean_set: Path,
    triggered_set: Path,
    target: str | None,
    target_fpr: float | None,
    device: torch.device,
    reading: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, Any]:
    """What one version of a guard does to a user's own clean and triggered images, which its calibration should not have seen.

    Both sets carry true labels. target: the class that the attacker wants, by name; without it, any wrong class counts as the attacker's success.
    target_fpr: None for that of the calibration. `reading` is entered while the images, which nobody vouches for, are read. Raises a Problem.
    """
    guarded = bundle.read(folder)
    guarded.guard.to(device)
    names = guarded.description.class_names
    if target is not None and target not in names:
        raise ConfigInvalid(f"The guard knows no class {target!r}; its classes are {', '.join(names[:20])}{' ...' if len(names) > 20 else ''}.")
    promised = conformal_threshold(guarded.validation_scores, target_fpr or guarded.description.threshold.target_fpr)
    (clean, warnings), (triggered, more) = (_scored(guarded, *each, reading) for each in ((clean_set, "clean set"), (triggered_set, "triggered set")))
    true = triggered.wanted
    if target is None:
        missed = torch.full_like(true, -1)  # nothing that can be predicted
        triggered = replace(triggered, wanted=torch.where(triggered.prediction != true, triggered.prediction, missed))
    else:
        wanted = names.index(target)
        eligible = true != wanted
        if not eligible.any():
            raise ConfigInvalid(f"All triggered images are labelled {target!r}, which the attacker wants: they must be under their true labels.")
        triggered = Scored(triggered.score[eligible], triggered.prediction[eligible], torch.full_like(true[eligible], wanted))
    found = figures(clean, triggered, guarded.validation_scores, (promised.target_fpr,))
    at = found.pop("at")[f"{promised.target_fpr:g}"]
    return {
        **{"bundle_id": guarded.bundle_id, "target_fpr": promised.target_fpr, "threshold": promised.value, **found, **at},
        "rejected": int((~(clean.score >= promised.value)).sum()),
        "rejections_expected": rejections_expected(promised, len(clean.score)),
        "warnings": [*warnings, *more],
    }


def _scored(guarded: Bundle, path: Path, kind: str, reading: Callable[[], AbstractContextManager[None]]) -> tuple[Scored, list[str]]:
    """All images of a file as the guard sees them, wanted being their labels; and what was forgiven about the file."""
    description, judged = guarded.description, []
    try:
        with reading():
            opened = open_clean_set(path, Limits(min_images=1))
            images = opened.labelled_by(description.num_classes, description.class_names, least_classes=1)
        for first in range(0, len(images), CHUNK):
            with reading():
                pixels = torch.stack([description.preprocessing.pixels(image) for image in images.images(range(first, min(first + CHUNK, len(images))))])
            judged.append(guarded.guard.judge(pixels))
    except CleanSetProblem as problem:
        raise type(problem)(f"In the {kind}: {problem.detail}") from problem
    score, prediction = (torch.cat([getattr(part, name) for part in judged]) for name in ("score", "prediction"))
    return Scored(score, prediction, torch.from_numpy(images.labels)), [
        f"In the {kind}: {warning}" for warning in opened.warnings
    ]  # absent classes are no fault here
