"""The two ways to make experts and an auxiliary out of a suspect: the published recipe, and the one that finds its own settings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from calibration.config import AutoRecipe, CalibrationConfig, PaperRecipe, paper_recipe
from calibration.finetune import Curve, LabelledPixels, Progress, accuracy, shift, train_auxiliary, train_expert, train_tails
from calibration.material import Material
from calibration.progress import Tracker
from calibration.resume import Made, Resume
from models import trunk
from models.errors import TrainingDiverged
from models.guard import Cuts
from models.trunk import tail_copy


@dataclass(frozen=True)
class Trained:
    """What a preset made, with the settings it found and what its training went through."""

    experts: list[nn.Module]
    auxiliary: nn.Module
    cuts: Cuts | None
    c: float
    settings: dict[str, Any]
    expert_curves: list[Curve]
    auxiliary_curve: Curve


def train(config: CalibrationConfig, material: Material, tracker: Tracker, resume: Resume) -> Trained:
    """Experts and auxiliary by the preset that the configuration names."""
    if material.held_back is None:
        return _train_paper(config, material, tracker, resume)
    return _train_auto(config, material, material.held_back, tracker, resume)


def _train_paper(config: CalibrationConfig, material: Material, tracker: Tracker, resume: Resume) -> Trained:
    fit, preprocessing, suspect = material.fit, material.preprocessing, material.network
    recipe = paper_recipe(material.understood.suspect.architecture.short_name, preprocessing.size)
    with tracker.stage("expert") as step:

        def make_expert() -> Made:
            wrong = shift(material.num_classes)
            expert, curve = train_expert(suspect, fit, wrong, preprocessing, lr=recipe.expert_lr, batch=recipe.expert_batch, seed=config.seed, progress=step)
            _must_be_finite([expert])
            return [expert], {"curves": [asdict(curve)]}

        experts, expert_known = resume.networks("expert", lambda _: [copy.deepcopy(suspect)], make_expert)
    with tracker.stage("auxiliary") as step:

        def make_auxiliary() -> Made:
            auxiliary, curve = _auxiliary(config, material, None, recipe, recipe.auxiliary_lr, step)
            _must_be_finite([auxiliary])
            return [auxiliary], {"curve": asdict(curve)}

        (auxiliary,), known = resume.networks("auxiliary", lambda _: [copy.deepcopy(suspect)], make_auxiliary)
    return Trained(experts, auxiliary, None, recipe.c, asdict(recipe), [_curve(each) for each in expert_known["curves"]], _curve(known["curve"]))


def _train_auto(config: CalibrationConfig, material: Material, held_back: LabelledPixels, tracker: Tracker, resume: Resume) -> Trained:
    recipe, suspect, fit, preprocessing = AutoRecipe(), material.network, material.fit, material.preprocessing
    with tracker.stage("expert") as step:
        cuts, share = choose_cuts(suspect, preprocessing.normalise(fit.pixels[:1]), recipe)
        cut = None if cuts is None else cuts.experts

        def make_experts() -> Made:
            for lr in recipe.expert_lrs:
                tails, curves = train_tails(
                    suspect,
                    cut,
                    recipe.experts,
                    fit,
                    held_back,
                    material.num_classes,
                    preprocessing,
                    lr=lr,
                    batch=recipe.expert_batch,
                    stop_at=recipe.expert_stop,
                    max_steps=recipe.expert_steps,
                    seed=config.seed,
                    progress=step,
                )
                if _finite(tails):
                    break
            _must_be_finite(tails)
            return tails, {"curves": [asdict(curve) for curve in curves], "lr": lr}

        tails, expert_known = resume.networks("expert", lambda _: [tail_copy(suspect, cut) for _ in range(recipe.experts)], make_experts)
    with tracker.stage("auxiliary") as step:

        def make_auxiliary() -> Made:
            keep = recipe.auxiliary_keep * accuracy(suspect.eval(), held_back, preprocessing)
            for lr in recipe.auxiliary_lrs:
                auxiliary, curve = _auxiliary(config, material, held_back, recipe, lr, step)
                if curve.accuracy[-1] >= keep:
                    break
            _must_be_finite([auxiliary])
            return [auxiliary], {"curve": asdict(curve), "lr": lr}

        (auxiliary,), known = resume.networks("auxiliary", lambda _: [copy.deepcopy(suspect)], make_auxiliary)
    found = {"expert_lr": expert_known["lr"], "auxiliary_lr": known["lr"], "cuts": None if cuts is None else asdict(cuts), "tail_share_found": round(share, 4)}
    curves = [_curve(each) for each in expert_known["curves"]]
    return Trained(tails, auxiliary, cuts, recipe.c, {**asdict(recipe), **found}, curves, _curve(known["curve"]))


def _auxiliary(
    config: CalibrationConfig, material: Material, held_back: LabelledPixels | None, recipe: PaperRecipe | AutoRecipe, lr: float, step: Progress
) -> tuple[nn.Module, Curve]:
    return train_auxiliary(
        material.network,
        material.fit,
        held_back,
        material.preprocessing,
        lr=lr,
        batch=recipe.auxiliary_batch,
        epochs=recipe.auxiliary_epochs,
        steps_at=recipe.auxiliary_steps,
        decay=recipe.auxiliary_decay,
        seed=config.seed,
        progress=step,
    )


def _finite(networks: Sequence[nn.Module]) -> bool:
    return all(bool(value.isfinite().all()) for network in networks for value in network.state_dict().values())


def _must_be_finite(networks: Sequence[nn.Module]) -> None:
    if not _finite(networks):
        raise TrainingDiverged


def _curve(known: dict[str, Sequence[Any]]) -> Curve:
    return Curve(**{name: tuple(values) for name, values in known.items()})


def choose_cuts(network: nn.Module, example: Tensor, recipe: AutoRecipe) -> tuple[Cuts | None, float]:
    """Where to cut, and the share of the network behind it. None for a network that cannot be: its experts are then whole copies of it."""
    try:
        cut = trunk.choose_cut(network, example, recipe.tail_share)
        places = trunk.places(network, example, (recipe.tail_share, *recipe.distance_shares))
        return Cuts(experts=cut.name, places=tuple(place.name for place in places)), cut.tail_share
    except trunk.CannotCut:
        return None, 1.0
