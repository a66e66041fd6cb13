"""A calibration from beginning to end: read, find the preprocessing, make expert and auxiliary, set the threshold, report, publish.

Deterministic: the same inputs, configuration and seed on the same machine give the same weights and threshold, byte for byte.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration import checks
from calibration.clean_set import CleanSet, open_clean_set
from calibration.config import AutoRecipe, CalibrationConfig, paper_recipe
from calibration.finetune import Curve, LabelledPixels, accuracy, shift, train_auxiliary, train_expert, train_tails
from calibration.preprocessing import Candidate, find_preprocessing
from calibration.progress import Progress, Tracker
from calibration.split import Parts, hold_back, split
from models import architectures, bundle, trunk
from models.checkpoint import Checkpoint, load_weights, read_checkpoint
from models.errors import SuspectModelUseless
from models.guard import Cuts, Guard, Judgement, fuse
from models.parallel import cpu_threads
from models.preprocessing import Preprocessing
from models.registry import Registry
from models.threshold import Threshold, conformal_threshold


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
class _Material:
    """What was read: the suspect on the training device, and the parts of the clean set with their labels."""

    fit: architectures.Fit
    suspect: nn.Module
    clean: CleanSet
    validation: CleanSet
    parts: Parts
    device: torch.device

    @property
    def num_classes(self) -> int:
        assert self.fit.num_classes is not None  # `identify` gives exact fits only
        return self.fit.num_classes


@dataclass(frozen=True)
class _Trained:
    """What a preset made, with the settings it found and what its training went through."""

    experts: list[nn.Module]
    auxiliary: nn.Module
    cuts: Cuts | None
    c: float
    settings: dict[str, Any]
    expert_curves: list[Curve]
    auxiliary_curve: Curve


def calibrate(
    config: CalibrationConfig,
    inputs: Inputs,
    registry: Registry,
    device: torch.device,
    emit: Callable[[Progress], None] = lambda _: None,
    record: dict[str, Any] | None = None,
) -> Result:
    """Make and publish a version of the guard `config.name`; it is not activated. Raises a Problem, and publishes nothing then.

    `record` is kept beside the bundle: what started this calibration, for whoever has to find it again after a crash.
    """
    tracker = Tracker(emit)
    with tracker.stage("read") as step:
        material = _read(config, inputs, device, step)
    with tracker.stage("preprocessing"):
        fit_rows, labels = material.parts.fit, torch.from_numpy(material.clean.labels[material.parts.fit])
        order = torch.from_numpy(np.random.default_rng(config.seed).permutation(len(fit_rows)))
        shuffled = fit_rows[order.numpy()].tolist()
        size = material.fit.architecture.size
        finding = find_preprocessing(material.suspect, material.clean.image, shuffled, labels[order], size, device)
        _refuse_at_chance(finding.best, np.bincount(labels.numpy()).max() / len(labels))
        preprocessing = finding.best.preprocessing
        fit = _load(material.clean, fit_rows, preprocessing, device)
        held_back = _load(material.clean, material.parts.held_back, preprocessing, device) if len(material.parts.held_back) else None
        validation = _load(material.validation, material.parts.validation, preprocessing, device)
    if held_back is None:
        trained = _train_paper(config, material, fit, preprocessing, tracker)
    else:
        trained = _train_auto(config, material, fit, held_back, preprocessing, tracker)
    with tracker.stage("threshold"):
        guard = Guard(material.suspect, trained.experts, trained.auxiliary, preprocessing, cuts=trained.cuts, c=trained.c)
        if held_back is not None:
            guard = fuse(guard, fit.pixels, fit.labels, held_back.pixels, material.num_classes)
        judged = guard.judge(validation.pixels)
        threshold = conformal_threshold(judged.score, config.target_fpr)
        accuracies = _accuracies(guard, trained, validation, judged)
    with tracker.stage("report"):
        from calibration.report import render  # imports matplotlib: not for a check, nor before there is something to draw

        report = _report(config, material, finding.candidates, trained, threshold, accuracies, judged, tracker.seconds)
        html = render(report, judged, validation.labels.cpu(), threshold, trained.expert_curves, trained.auxiliary_curve)
    with tracker.stage("publish"), registry.staging() as folder:
        description = bundle.Description(
            architecture=material.fit.architecture.name,
            num_classes=material.num_classes,
            class_names=material.clean.names,
            preprocessing=preprocessing,
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
    return Result(config.name, version, bundle_id, {**report, "stage_seconds": dict(tracker.seconds)})  # with the last stages, too


def check(config: CalibrationConfig, inputs: Inputs) -> None:
    """Read everything as a calibration would, and stop before the work. Raises a Problem."""
    _read(config, inputs, torch.device("cpu"), lambda _: None)


def _read(config: CalibrationConfig, inputs: Inputs, device: torch.device, step: Callable[[float], None]) -> _Material:
    checkpoint: Checkpoint = read_checkpoint(inputs.checkpoint)
    tensors = load_weights(checkpoint)
    fit = architectures.identify(tensors, config.architecture)
    suspect = architectures.instantiate(fit.architecture.name, fit.num_classes or 0, tensors).to(device)
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(suspect, fit.architecture.size))
    step(0.3)
    num_classes = fit.num_classes or 0
    clean = open_clean_set(inputs.clean_set).labelled_by(num_classes, config.classes)
    step(0.9)
    held_back = AutoRecipe.held_back if config.preset == "auto" else 0.0
    if inputs.validation_set is None:
        parts = split(clean.labels, clean.groups, config.target_fpr, held_back, config.seed)
        return _Material(fit, suspect, clean, clean, parts, device)
    validation = open_clean_set(inputs.validation_set).labelled_by(num_classes, config.classes)
    conformal_threshold(torch.zeros(len(validation)), config.target_fpr)  # raises now, not after minutes of training, where it is out of reach
    fit_rows, back = hold_back(np.arange(len(clean)), clean.labels, clean.groups, held_back, config.seed)
    return _Material(fit, suspect, clean, validation, Parts(fit_rows, back, np.arange(len(validation))), device)


def _refuse_at_chance(best: Candidate, largest_class: float) -> None:
    if best.accuracy < 1.5 * largest_class and best.accuracy < (1 + largest_class) / 2:
        raise SuspectModelUseless(
            f"The suspect gets {best.accuracy:.1%} of the clean images right under the best preprocessing found; always naming the largest class gives "
            f"{largest_class:.1%}. Either the class order differs (give the class names in the order of the suspect's outputs as `classes`), or the clean "
            "set is not from its task, or the model is not trained."
        )


def _load(clean: CleanSet, rows: Sequence[int] | np.ndarray, preprocessing: Preprocessing, device: torch.device) -> LabelledPixels:
    pixels = torch.stack([preprocessing.pixels(clean.image(int(row))) for row in rows])
    return LabelledPixels(pixels.to(device), torch.from_numpy(clean.labels[rows]).to(device))


def _train_paper(config: CalibrationConfig, material: _Material, fit: LabelledPixels, preprocessing: Preprocessing, tracker: Tracker) -> _Trained:
    recipe = paper_recipe(material.fit.architecture.name, preprocessing.size)
    with tracker.stage("expert") as step:
        wrong = shift(material.num_classes)
        expert, expert_curve = train_expert(
            material.suspect, fit, wrong, preprocessing, lr=recipe.expert_lr, batch=recipe.expert_batch, seed=config.seed, progress=step
        )
    with tracker.stage("auxiliary") as step:
        auxiliary, curve = train_auxiliary(
            material.suspect,
            fit,
            None,
            preprocessing,
            lr=recipe.auxiliary_lr,
            batch=recipe.auxiliary_batch,
            epochs=recipe.auxiliary_epochs,
            steps_at=recipe.auxiliary_steps,
            decay=recipe.auxiliary_decay,
            seed=config.seed,
            progress=step,
        )
    return _Trained([expert], auxiliary, None, recipe.c, asdict(recipe), [expert_curve], curve)


def _train_auto(
    config: CalibrationConfig,
    material: _Material,
    fit: LabelledPixels,
    held_back: LabelledPixels,
    preprocessing: Preprocessing,
    tracker: Tracker,
) -> _Trained:
    recipe, suspect = AutoRecipe(), material.suspect
    with tracker.stage("expert") as step:
        example = preprocessing.normalise(fit.pixels[:1])
        cut = trunk.choose_cut(suspect, example, recipe.tail_share)
        cuts = Cuts(experts=cut.name, features=trunk.feature_cut(suspect, example).name)
        tails, expert_curves = train_tails(
            suspect,
            cut.name,
            recipe.experts,
            fit,
            held_back,
            material.num_classes,
            preprocessing,
            lr=recipe.expert_lr,
            batch=recipe.expert_batch,
            stop_at=recipe.expert_stop,
            max_steps=recipe.expert_steps,
            seed=config.seed,
            progress=step,
        )
    with tracker.stage("auxiliary") as step:
        keep = recipe.auxiliary_keep * accuracy(suspect.eval(), held_back, preprocessing)
        for lr in recipe.auxiliary_lrs:
            auxiliary, curve = train_auxiliary(
                suspect,
                fit,
                held_back,
                preprocessing,
                lr=lr,
                batch=recipe.auxiliary_batch,
                epochs=recipe.auxiliary_epochs,
                steps_at=recipe.auxiliary_steps,
                decay=recipe.auxiliary_decay,
                seed=config.seed,
                progress=step,
            )
            if curve.accuracy[-1] >= keep:
                break
    settings = {**asdict(recipe), "auxiliary_lr": lr, "cuts": asdict(cuts), "tail_share_found": round(cut.tail_share, 4)}
    return _Trained(tails, auxiliary, cuts, recipe.c, settings, expert_curves, curve)


def _accuracies(guard: Guard, trained: _Trained, validation: LabelledPixels, judged: Judgement) -> dict[str, Any]:
    def right(network: nn.Module, batches: Sequence[Tensor]) -> float:
        return (torch.cat([network(batch).argmax(1) for batch in batches]) == validation.labels).float().mean().item()

    with torch.inference_mode():
        inputs = [guard.preprocessing.normalise(part) for part in validation.pixels.split(256)]
        shared = [guard.parts[0](batch) for batch in inputs]
        return {
            "suspect": (judged.prediction == validation.labels.cpu()).float().mean().item(),
            "experts": [right(expert, shared) for expert in trained.experts],
            "auxiliary": right(trained.auxiliary, inputs),
        }


def _report(
    config: CalibrationConfig,
    material: _Material,
    candidates: Sequence[Candidate],
    trained: _Trained,
    threshold: Threshold,
    accuracies: dict[str, Any],
    judged: Judgement,
    seconds: dict[str, float],
) -> dict[str, Any]:
    cautions = [
        checks.expert_still_accurate(accuracies["experts"], accuracies["suspect"]),
        checks.auxiliary_lost_accuracy(accuracies["auxiliary"], accuracies["suspect"]),
        checks.wide_interval(threshold),
        checks.degenerate_scores(len(judged.score.unique()), threshold.n),
    ]
    return {
        "guard": config.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "preset": config.preset,
        "seed": config.seed,
        "architecture": material.fit.architecture.name,
        "classes": list(material.clean.names),
        "promise": asdict(threshold),
        "clean_accuracy": accuracies,
        "images": {name: len(rows) for name, rows in vars(material.parts).items()},
        "preprocessing": [{**asdict(candidate), "preprocessing": candidate.preprocessing.to_json()} for candidate in candidates],
        "settings": trained.settings,
        "expert_steps": [curve.steps[-1] if curve.steps else 0 for curve in trained.expert_curves],
        "warnings": [caution.to_json() for caution in cautions if caution] + [{"code": "clean-set", "detail": text} for text in material.clean.warnings],
        "stage_seconds": dict(seconds),
        "environment": {
            "device": material.device.type,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
    }
