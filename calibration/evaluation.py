"""What a guard does to a user's own images, clean and triggered."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from calibration.clean_set import Limits, named, open_clean_set
from calibration.figures import Scored, figures
from models import bundle
from models.bundle import Bundle
from models.errors import ConfigInvalid
from models.threshold import conformal_threshold, rejections_expected

CHUNK = 256  # images decoded at a time


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
    guarded = bundle.read(folder, device)
    guarded.guard.to(device)
    bundle.check(guarded)
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
        "rejected": int(promised.rejects(clean.score).sum()),
        "rejections_expected": rejections_expected(promised, len(clean.score)),
        "warnings": [*warnings, *more],
    }


def _scored(guarded: Bundle, path: Path, kind: str, reading: Callable[[], AbstractContextManager[None]]) -> tuple[Scored, list[str]]:
    """All images of a file as the guard sees them, wanted being their labels; and what was forgiven about the file."""
    description, judged = guarded.description, []
    with named(kind):
        with reading():
            opened = open_clean_set(path, Limits(min_images=1))
            images = opened.labelled_by(description.num_classes, description.class_names, least_classes=1)
        for first in range(0, len(images), CHUNK):
            with reading():
                pixels = torch.stack([description.preprocessing.pixels(image) for image in images.images(range(first, min(first + CHUNK, len(images))))])
            judged.append(guarded.guard.judge(pixels))
    score, prediction = (torch.cat([getattr(part, name) for part in judged]) for name in ("score", "prediction"))
    warnings = [f"In the {kind}: {warning}" for warning in opened.warnings]  # not those of `images`: absent classes are no fault here
    return Scored(score, prediction, torch.from_numpy(images.labels)), warnings
