"""The two ways to make experts and an auxiliary out of a suspect: the published recipe, and the one that finds its own settings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from calibration.config import CalibrationConfig
from calibration.finetune import Curve, LabelledPixels, finite, shift, train_auxiliary, train_expert
from calibration.material import Material
from calibration.progress import Tracker
from calibration.recipes import auto_recipe, paper_recipe
from calibration.resume import Made, Resume
from calibration.search import Searched, default_setting, search
from calibration.workshop import Workshop, choose_cuts
from models.errors import TrainingDiverged
from models.guard import Cuts, Guard
from models.trunk import tail_copy


@dataclass(frozen=True)
class Trained:
    """What a preset made, with the settings it found and what its training went through."""

    make_guard: Callable[[], Guard]  # as it is served; measures what its score needs to know of clean images
    cuts: Cuts | None
    settings: dict[str, Any]
    expert_curves: list[Curve]
    auxiliary_curve: Curve
    searched: Searched | None = None  # what canaries said, where they were asked


def train(config: CalibrationConfig, material: Material, tracker: Tracker, resume: Resume) -> Trained:
    """Experts and auxiliary by the preset that the configuration names."""
    if config.preset == "paper":
        return _train_paper(config, material, tracker, resume)
    assert material.held_back is not None  # only `paper` looks at none
    return _train_auto(config, material, material.held_back, tracker, resume)


def _train_paper(config: CalibrationConfig, material: Material, tracker: Tracker, resume: Resume) -> Trained:
    fit, preprocessing, suspect = material.fit, material.preprocessing, material.network
    recipe = paper_recipe(material.understood.suspect.architecture.short_name, preprocessing.size)
    with tracker.stage("expert") as advance:

        def make_expert() -> Made:
            wrong = shift(material.num_classes)
            expert, curve = train_expert(suspect, fit, wrong, preprocessing, lr=recipe.expert_lr, batch=recipe.expert_batch, seed=config.seed, advance=advance)
            if not finite([expert]):
                raise TrainingDiverged
            return [expert], {"curves": [asdict(curve)]}

        experts, expert_known = resume.networks("expert", lambda: [copy.deepcopy(suspect)], make_expert)
    with tracker.stage("auxiliary") as advance:

        def make_auxiliary() -> Made:
            auxiliary, curve = train_auxiliary(
                suspect,
                fit,
                None,
                preprocessing,
                lr=recipe.auxiliary_lr,
                batch=recipe.auxiliary_batch,
                epochs=recipe.auxiliary_epochs,
                steps_at=recipe.auxiliary_steps,
                decay=recipe.auxiliary_decay,
                seed=config.seed,
                advance=advance,
            )
            if not finite([auxiliary]):
                raise TrainingDiverged
            return [auxiliary], {"curve": asdict(curve)}

        (auxiliary,), known = resume.networks("auxiliary", lambda: [copy.deepcopy(suspect)], make_auxiliary)
    make_guard = partial(Guard, suspect, experts, auxiliary, preprocessing, c=recipe.c)
    return Trained(make_guard, None, asdict(recipe), [_curve(each) for each in expert_known["curves"]], _curve(known["curve"]))


def _train_auto(config: CalibrationConfig, material: Material, held_back: LabelledPixels, tracker: Tracker, resume: Resume) -> Trained:
    recipe, network = auto_recipe(config.target_fpr), material.network
    cuts, share = choose_cuts(network, material.preprocessing.normalise(material.fit.pixels[:1]), recipe)
    workshop = Workshop(recipe, material, held_back, cuts, config.seed)
    searched = None
    if config.searches:
        with tracker.stage("canaries") as advance:
            searched = search(workshop, config.budget, config.target_fpr, resume, advance)
    setting = default_setting(workshop) if searched is None else searched.chosen
    with tracker.stage("expert") as advance:

        def make_experts() -> Made:
            tails, curves, lr = workshop.experts(network, setting.expert_stop, advance)
            return tails, {"curves": [asdict(curve) for curve in curves], "lr": lr}

        tails, expert_known = resume.networks("expert", lambda: [tail_copy(network, workshop.cut) for _ in range(recipe.experts)], make_experts)
    with tracker.stage("auxiliary") as advance:

        def make_auxiliary() -> Made:
            auxiliary, curve, lr = workshop.auxiliary(network, setting.auxiliary_lr, advance)
            return [auxiliary], {"curve": asdict(curve), "lr": lr}

        (auxiliary,), known = resume.networks("auxiliary", lambda: [copy.deepcopy(network)], make_auxiliary)
    found = {"expert_stop": workshop.stop_at(network, setting.expert_stop), "expert_lr": expert_known["lr"], "auxiliary_lr": known["lr"]}
    where = {"cuts": None if cuts is None else asdict(cuts), "tail_share_found": round(share, 4)}
    curves = [_curve(each) for each in expert_known["curves"]]
    make_guard = partial(workshop.guard, network, tails, auxiliary)
    return Trained(make_guard, cuts, {**asdict(recipe), **found, **where}, curves, _curve(known["curve"]), searched)


def _curve(known: dict[str, Sequence[Any]]) -> Curve:
    return Curve(**{name: tuple(values) for name, values in known.items()})
