"""A calibration from beginning to end: read, find the preprocessing, make expert and auxiliary, set the threshold, report, publish.

Deterministic: the same inputs, configuration and seed on the same machine give the same weights and threshold, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calibration.clean_set import CleanSet, open_clean_set
from calibration.config import AutoRecipe, CalibrationConfig
from calibration.finetune import LabelledPixels
from calibration.presets import Material, train
from calibration.progress import Progress, Tracker
from calibration.resume import Resume
from calibration.split import Parts, hold_back, split
from calibration.summary import measure_accuracies, summarise
from calibration.suspect import Suspect, named_classes, read_suspect, refuse_disorder, understand
from models import bundle
from models.guard import Guard, fuse
from models.preprocessing import Preprocessing
from models.registry import Registry
from models.threshold import conformal_threshold


@dataclass(frozen=True)
class Inputs:
    """Where the operator's files lie; without a validation set, a part of the clean set becomes it."""

    checkpoint: Path
    clean_set: Path
    validation_set: Path | None = None


@dataclass(frozen=True)
class Result:
    """A published version of a guard."""

    guard: str
    version: int
    bundle_id: str
    report: dict[str, Any]


@dataclass(frozen=True)
class _Opened:
    """What was read: the suspect and the parts of the clean set with their labels."""

    suspect: Suspect
    clean: CleanSet
    validation: CleanSet
    parts: Parts


def calibrate(
    config: CalibrationConfig,
    inputs: Inputs,
    registry: Registry,
    device: torch.device,
    emit: Callable[[Progress], None] = lambda _: None,
    record: dict[str, Any] | None = None,
    reading: Callable[[], AbstractContextManager[None]] = nullcontext,
    unfinished: Path | None = None,
) -> Result:
    """Make and publish a version of the guard `config.name`; it is not activated. Raises a Problem, and publishes nothing then.

    `record` is kept beside the bundle: what started this calibration, for whoever has to find it again after a crash. `reading` is entered
    while untrusted bytes are read. What its stages made is kept in the folder `unfinished` until it is published: begun anew with the same folder, a
    calibration that was stopped goes on behind its last finished stage, with the same result.
    """
    tracker = Tracker(emit)
    with tracker.stage("read") as step, reading():
        opened = _open(config, inputs, device, step)
    with tracker.stage("preprocessing"), reading():
        material = _understand(config, opened, device)
    resume = Resume(unfinished, material.fingerprint(config) if unfinished is not None else "")
    trained = train(config, material, tracker, resume)
    with tracker.stage("threshold"):
        guard = Guard(material.network, trained.experts, trained.auxiliary, material.preprocessing, cuts=trained.cuts, c=trained.c)
        if material.held_back is not None and trained.cuts is not None:
            guard = fuse(guard, material.fit.pixels, material.fit.labels, material.held_back.pixels, material.num_classes)
        judged = guard.judge(material.validation.pixels)
        threshold = conformal_threshold(judged.score, config.target_fpr)
        accuracies = measure_accuracies(guard, material, trained, judged)
    with tracker.stage("report"):
        from calibration.report import render  # imports matplotlib: not for a check, nor before there is something to draw

        report = summarise(config, opened.clean, opened.parts, material, trained, threshold, accuracies, judged, tracker.seconds, resume.taken)
        html = render(report, judged, material.validation.labels.cpu(), threshold, trained.expert_curves, trained.auxiliary_curve)
    with tracker.stage("publish"), registry.staging() as folder:
        description = bundle.Description(
            architecture=material.understood.suspect.architecture.name,
            architecture_options=dict(material.understood.suspect.architecture.options),
            num_classes=material.num_classes,
            class_names=opened.clean.names,
            preprocessing=material.preprocessing,
            preset=config.preset,
            seed=config.seed,
            cuts=trained.cuts,
            experts=len(trained.experts),
            c=trained.c,
            scales=None if guard.fusion is None else guard.fusion.scales,
            threshold=threshold,
        )
        reports = {"report.json": json.dumps(report, indent=1, allow_nan=False), "report.html": html}
        bundle_id = bundle.write(folder, description, guard, judged.score, {"created": report["created"], **(record or {})}, reports)
        version = registry.publish(config.name, folder)
    resume.done()
    return Result(config.name, version, bundle_id, {**report, "stage_seconds": dict(tracker.seconds)})  # with the last stages, too


def check(config: CalibrationConfig, inputs: Inputs) -> None:
    """Read everything as a calibration would, and stop before the work. Raises a Problem."""
    _open(config, inputs, torch.device("cpu"), lambda _: None)


def _open(config: CalibrationConfig, inputs: Inputs, device: torch.device, step: Callable[[float], None]) -> _Opened:
    suspect = read_suspect(inputs.checkpoint, config.architecture, config.num_classes, device)
    step(0.3)
    clean = _labelled(inputs.clean_set, config, suspect)
    step(0.9)
    held_back = AutoRecipe.held_back if config.preset == "auto" else 0.0
    if inputs.validation_set is None:
        parts = split(clean.labels, clean.groups, config.target_fpr, held_back, config.seed)
        return _Opened(suspect, clean, clean, parts)
    validation = _labelled(inputs.validation_set, config, suspect)
    conformal_threshold(torch.zeros(len(validation)), config.target_fpr)  # raises now, not after minutes of training, where it is out of reach
    fit_rows, back = hold_back(np.arange(len(clean)), clean.labels, clean.groups, held_back, config.seed)
    return _Opened(suspect, clean, validation, Parts(fit_rows, back, np.arange(len(validation))))


def _labelled(path: Path, config: CalibrationConfig, suspect: Suspect) -> CleanSet:
    clean = open_clean_set(path)
    return clean.labelled_by(suspect.num_classes, named_classes(config.classes, suspect, clean))


def _understand(config: CalibrationConfig, opened: _Opened, device: torch.device) -> Material:
    understood = understand(opened.suspect, opened.clean, opened.parts.fit, device, config.seed)
    refuse_disorder(understood)
    fit, held_back = (_load(opened.clean, rows, understood.preprocessing, device) for rows in (opened.parts.fit, opened.parts.held_back))
    validation = _load(opened.validation, opened.parts.validation, understood.preprocessing, device)
    return Material(understood, fit, held_back if len(held_back) else None, validation, device)


def _load(clean: CleanSet, rows: np.ndarray, preprocessing: Preprocessing, device: torch.device) -> LabelledPixels:
    pixels = [preprocessing.pixels(clean.image(int(row))) for row in rows]
    shape = (0, 3, preprocessing.size, preprocessing.size)
    stacked = torch.stack(pixels) if pixels else torch.empty(shape, dtype=torch.uint8)
    return LabelledPixels(stacked.to(device), torch.from_numpy(clean.labels[rows]).to(device))
