"""A calibration from beginning to end: read, find the preprocessing, make expert and auxiliary, set the threshold, report, publish.

Deterministic: the same inputs, configuration and seed on the same machine give the same weights and threshold, byte for byte; on a GPU
but for networks with a layer whose gradient has no deterministic kernel there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.config import CalibrationConfig
from calibration.material import Inputs, prepare, read
from calibration.presets import train
from calibration.progress import Progress, Tracker
from calibration.resume import Resume
from calibration.summary import measure_accuracies, summarise
from models import bundle
from models.errors import TrainingDiverged
from models.registry import Registry
from models.threshold import conformal_threshold


@dataclass(frozen=True)
class Result:
    """A published version of a guard."""

    guard: str
    version: int
    bundle_id: str
    report: dict[str, Any]


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
    tracker = Tracker(emit, () if config.searches else ("canaries",))
    with tracker.stage("read") as advance, reading():
        opened = read(config, inputs, device, advance)
    with tracker.stage("preprocessing"), reading():
        material = prepare(config, opened, device)
    resume = Resume(unfinished, material.fingerprint(config) if unfinished is not None else "")
    trained = train(config, material, tracker, resume)
    with tracker.stage("threshold"):
        guard = trained.make_guard()
        judged = guard.judge(material.validation.pixels, ungated=True)  # the report draws y
        if not judged.score.isfinite().all():
            raise TrainingDiverged
        threshold = conformal_threshold(judged.score, config.target_fpr)
        accuracies = measure_accuracies(guard, material, judged, threshold)
    with tracker.stage("report"):
        from calibration.report import render  # imports matplotlib: not for a check, nor before there is something to draw

        report = summarise(config, opened, material, trained, threshold, accuracies, judged, tracker.seconds, resume.taken)
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
            cuts=guard.cuts,
            experts=len(guard.experts),
            c=guard.c,
            scales=guard.scales,
            threshold=threshold,
        )
        reports = {"report.json": json.dumps(report, indent=1, allow_nan=False), "report.html": html}
        bundle_id = bundle.write(
            folder,
            description,
            guard,
            judged.score,
            {"created": report["created"], **(record or {})},
            reports,
            bundle.nearest(material.validation.pixels, judged.score, threshold),
        )
        version = registry.publish(config.name, folder)
    resume.done()
    return Result(config.name, version, bundle_id, {**report, "stage_seconds": dict(tracker.seconds)})  # with the last stages, too
