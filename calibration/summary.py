"""What a calibration found and made, as figures."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration import checks
from calibration.config import CalibrationConfig
from calibration.labels import contamination
from calibration.material import Material, Opened
from calibration.presets import Trained
from calibration.suspect import by_name, doubts_on_images
from models.guard import Guard, Judgement, fed
from models.threshold import Threshold


def measure_accuracies(guard: Guard, material: Material, judged: Judgement, threshold: Threshold) -> dict[str, Any]:
    """Shares of the validation images that each network gets right, those of the experts in a list; guarded: the suspect does, and the guard accepts."""
    validation = material.validation
    suspect_right = judged.prediction == validation.labels.cpu()

    def right(network: nn.Module, batch: Tensor, labels: Tensor) -> int:
        return int((fed(network, batch).argmax(1) == labels).sum())

    experts, auxiliary = [0 for _ in guard.experts], 0
    with torch.inference_mode():
        for pixels, labels in zip(validation.pixels.split(256), validation.labels.split(256), strict=True):
            inputs = guard.preprocessing.normalise(pixels)
            shared = guard.evidence(inputs).shared
            experts = [count + right(expert, shared, labels) for count, expert in zip(experts, guard.experts, strict=True)]
            auxiliary += right(guard.auxiliary, inputs, labels)
    return {
        "suspect": int(suspect_right.sum()) / len(validation),
        "guarded": int((suspect_right & ~threshold.rejects(judged.score)).sum()) / len(validation),
        "experts": [count / len(validation) for count in experts],
        "auxiliary": auxiliary / len(validation),
    }


def summarise(
    config: CalibrationConfig,
    opened: Opened,
    material: Material,
    trained: Trained,
    threshold: Threshold,
    accuracies: dict[str, Any],
    judged: Judgement,
    seconds: dict[str, float],
    resumed: Sequence[str],
) -> dict[str, Any]:
    """The report as JSON: what the page shows, the service answers and the bundle keeps."""
    clean, suspect, finding = opened.clean, material.understood.suspect, material.understood.finding
    images = {"fit": len(material.fit), "held_back": len(material.held_back or ()), "validation": len(material.validation)}
    canaries = [] if trained.searched is None else trained.searched.canaries
    of_copy = None if trained.searched is None else trained.searched.copy
    labels, fit = material.validation.labels.cpu(), material.fit.labels.cpu()
    held_back = labels[:0] if material.held_back is None else material.held_back.labels.cpu()
    contradicted = contamination(judged.confidence, judged.prediction, labels, len(clean.names))
    cautions = [
        checks.suspect_near_chance(judged.prediction, labels, len(clean.names)),
        checks.expert_still_accurate(accuracies["experts"], accuracies["suspect"], trained.settings.get("expert_stop")),
        checks.auxiliary_lost_accuracy(accuracies["auxiliary"], accuracies["suspect"]),
        checks.wide_interval(threshold),
        checks.repeated_images(len(np.unique(opened.validation.groups[material.parts.validation])), threshold.n),
        checks.unvalidated_classes(labels, torch.cat([fit, held_back]), clean.names),
        checks.untrained_classes(fit, torch.cat([held_back, labels]), clean.names),
        checks.degenerate_scores(len(judged.score.unique()), threshold.n),
        checks.uneven_rejections(threshold.rejects(judged.score), labels, clean.names),
        checks.own_errors(judged.score, judged.prediction == labels, threshold),
        checks.no_canary_took(canaries, of_copy),
        checks.low_power(canaries),
        checks.sampled(len(opened.parts) - len(material.parts), len(material.parts)),
        checks.no_cut(config.preset == "auto" and trained.cuts is None),
        *doubts_on_images(material.understood, clean),
        *checks.contaminated(contradicted.concentrations, threshold.n, "validation", clean.names),
    ]
    return {
        "guard": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "preset": config.preset,
        "budget": config.budget if config.preset == "auto" else None,
        "seed": config.seed,
        "files": opened.digests,
        "checkpoint_notes": [*suspect.checkpoint.notes, *suspect.notes],
        "architecture": suspect.architecture.name,
        "classes": list(clean.names),
        "promise": asdict(threshold),
        "clean_accuracy": accuracies,
        "images": images,
        "preprocessing": [{**asdict(candidate), "preprocessing": candidate.preprocessing.to_json()} for candidate in finding.candidates],
        "preprocessing_notes": list(finding.notes),
        "settings": trained.settings,
        "canaries": [asdict(each) for each in canaries],
        "canary_copy": of_copy,
        "search": [] if trained.searched is None else trained.searched.tried,
        "chosen": None if trained.searched is None else asdict(trained.searched.chosen),
        "expert_steps": [curve.steps[-1] if curve.steps else 0 for curve in trained.expert_curves],
        "warnings": [caution.to_json() for caution in cautions if caution] + [{"code": "clean-set", "detail": text} for text in opened.warnings],
        "contradictions": by_name([replace(each, row=int(material.parts.validation[each.row])) for each in contradicted.contradictions], opened.validation),
        "stage_seconds": dict(seconds),
        "resumed": list(resumed),  # stages whose networks an earlier attempt had made
        "environment": {
            "device": material.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
    }
