"""The two ways to make experts and an auxiliary out of a suspect: the published recipe, and the one that finds its own settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibration.config import AutoRecipe, CalibrationConfig, paper_recipe
from calibration.finetune import Curve, LabelledPixels, accuracy, shift, train_auxiliary, train_expert, train_tails
from calibration.progress import Tracker
from calibration.suspect import Understood
from models import trunk
from models.guard import Cuts
from models.preprocessing import Preprocessing


@dataclass(frozen=True)
class Material:
    """What a preset works on, on the training device: the suspect as it was understood, and the parts of the clean set as it sees them."""

    understood: Understood
    fit: LabelledPixels
    held_back: LabelledPixels | None  # None where the preset looks at none
    validation: LabelledPixels
    device: torch.device

    @property
    def network(self) -> nn.Module:
        return self.understood.suspect.network

    @property
    def num_classes(self) -> int:
        return self.understood.suspect.num_classes

    @property
    def preprocessing(self) -> Preprocessing:
        return self.understood.preprocessing


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


def train(config: CalibrationConfig, material: Material, tracker: Tracker) -> Trained:
    """Experts and auxiliary by the preset that the configuration names."""
    return _train_paper(config, material, tracker) if material.held_back is None else _train_auto(config, material, material.held_back, tracker)


def _train_paper(config: CalibrationConfig, material: Material, tracker: Tracker) -> Trained:
    fit, preprocessing = material.fit, material.preprocessing
    recipe = paper_recipe(material.understood.suspect.architecture.short_name, preprocessing.size)
    with tracker.stage("expert") as step:
        wrong = shift(material.num_classes)
        expert, expert_curve = train_expert(
            material.network, fit, wrong, preprocessing, lr=recipe.expert_lr, batch=recipe.expert_batch, seed=config.seed, progress=step
        )
    with tracker.stage("auxiliary") as step:
        auxiliary, curve = train_auxiliary(
            material.network,
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
    return Trained([expert], auxiliary, None, recipe.c, asdict(recipe), [expert_curve], curve)


def _train_auto(config: CalibrationConfig, material: Material, held_back: LabelledPixels, tracker: Tracker) -> Trained:
    recipe, suspect, fit, preprocessing = AutoRecipe(), material.network, material.fit, material.preprocessing
    with tracker.stage("expert") as step:
        example = preprocessing.normalise(fit.pixels[:1])
        cuts, share = _choose_cuts(suspect, example, recipe.tail_share)
        tails, expert_curves = train_tails(
            suspect,
            None if cuts is None else cuts.experts,
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
    found = {"auxiliary_lr": lr, "cuts": None if cuts is None else asdict(cuts), "tail_share_found": round(share, 4)}
    settings = {**asdict(recipe), **found}
    return Trained(tails, auxiliary, cuts, recipe.c, settings, expert_curves, curve)


def _choose_cuts(network: nn.Module, example: Tensor, tail_share: float) -> tuple[Cuts | None, float]:
    """Where to cut, and the share of the network behind it. None for a network that cannot be: its experts are then whole copies of it."""
    try:
        cut = trunk.choose_cut(network, example, tail_share)
        return Cuts(experts=cut.name, features=trunk.feature_cut(network, example).name), cut.tail_share
    except trunk.CannotCut:
        return None, 1.0
