"""Choose the settings of `auto` by what a guard with them makes of canaries.

Guards of the canaried copy are made with every setting of a grid. The best is that whose worst-caught canary is caught most often, at the target FPR, among
held-back images; the default wins unless another does better by more than MARGIN. No validation image has a part in the choice, so that the promise of
the threshold stands. With the chosen setting the validation images then tell how often each kind is caught: the report's estimate of power.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from calibration.canary import KINDS, LEAST, Canary, Planted, Trigger, draw_all, plant, predictions
from calibration.config import Budget
from calibration.finetune import Advance, LabelledPixels, accuracy
from calibration.resume import Made, Resume
from calibration.workshop import Assembly, Workshop
from models.errors import TrainingDiverged
from models.guard import Guard
from models.threshold import conformal_threshold

MARGIN = 0.02  # a held-back part of some hundred images does not tell smaller differences from luck
MOST_STAMPED = 500  # images of a kind: enough for a power within two points, and bounded memory whatever the clean set
# What is tried beside the default, budget by budget.
STOPS: dict[Budget, tuple[float, ...]] = {"quick": (), "standard": (0.2, 0.4), "thorough": (0.2, 0.4)}
HOTTEST: dict[Budget, tuple[float, ...]] = {"quick": (), "standard": (0.1, 0.03), "thorough": (0.3, 0.1, 0.03)}


@dataclass(frozen=True)
class Setting:
    """What is searched."""

    expert_stop: float  # the held-back accuracy at which an expert is stopped, or less (`Workshop.stop_at`)
    auxiliary_lr: float  # the hottest that may be taken


@dataclass(frozen=True)
class Searched:
    """What the canaries said."""

    chosen: Setting
    canaries: list[Planted]
    copy: dict[str, float]  # as the report has it: the learning rate and the held-back accuracy of the copy, and the suspect's
    tried: list[dict[str, Any]]  # as the report has it: setting, and what it caught of each kind among held-back images


def search(workshop: Workshop, budget: Budget, target_fpr: float, resume: Resume, advance: Advance) -> Searched:
    """Plant canaries, try the settings of a budget, choose one, and estimate its power. Where no canary took, the default is chosen."""
    known: dict[str, Any]
    _, known = resume.networks("canaries", list, lambda: _search(workshop, budget, target_fpr, advance))
    return Searched(Setting(**known["chosen"]), [Planted(**each) for each in known["canaries"]], known["copy"], known["tried"])


def _search(workshop: Workshop, budget: Budget, target_fpr: float, advance: Advance) -> Made:
    material, held_back, default = workshop.material, workshop.held_back, default_setting(workshop)
    triggers = draw_all(KINDS, material.num_classes, material.fit.labels, held_back.labels, material.preprocessing.size, workshop.seed)
    suspect = accuracy(material.network.eval(), held_back, material.preprocessing)
    canary = plant_by_recipe(workshop, triggers, suspect, lambda done: advance(0.2 * done))

    def stamped(part: LabelledPixels) -> dict[str, LabelledPixels]:
        predicted = predictions(canary.network, part, material.preprocessing)
        return {trigger.kind: stamp(trigger, part, predicted) for trigger in canary.took}

    tried, power = [], dict[str, Caught]()
    guards, diverged = None, None
    if canary.took:
        try:
            guards = make_guards(workshop, canary.network, budget, lambda done: advance(0.2 + 0.7 * done))
        except TrainingDiverged:  # of the copy: the suspect's own guard may well be trained
            diverged = "the training of the copy's guard diverged"
    if guards is not None:
        told = stamped(held_back)
        for setting, guard in guards.items():
            shares = {kind: found.share for kind, found in caught(guard, held_back, told, target_fpr).items()}
            tried.append({**asdict(setting), "caught": shares})
    chosen = choose(tried, default)
    if guards is not None:
        power = caught(guards[chosen], material.validation, stamped(material.validation), target_fpr)
    advance(1.0)
    planted = []
    for trigger, asr, images, untaken in zip(canary.triggers, canary.asr, canary.images, canary.why_not, strict=True):
        why_not = untaken or diverged
        found = power.get(trigger.kind, Caught(None, 0))
        share = found.share if found.fooled >= LEAST else None
        planted.append(Planted(trigger.kind, round(asr, 4), images, why_not is None, why_not, share, found.fooled))
    of_copy = {"lr": canary.lr, "accuracy": round(canary.accuracy, 4), "suspect_accuracy": round(suspect, 4)}
    return [], {"chosen": asdict(chosen), "canaries": [asdict(each) for each in planted], "copy": of_copy, "tried": tried}


def default_setting(workshop: Workshop) -> Setting:
    """What `auto` takes without a search."""
    return Setting(workshop.recipe.expert_stop, workshop.recipe.auxiliary_lr)


def plant_by_recipe(workshop: Workshop, triggers: tuple[Trigger, ...], right: float, advance: Advance) -> Canary:
    """With the constants of the recipe, and its first learning rate that leaves the copy its task; none may do so. right: the suspect's held-back accuracy."""
    recipe, material = workshop.recipe, workshop.material
    for lr in recipe.canary_lrs:
        canary = plant(
            material.network,
            triggers,
            material.fit,
            workshop.held_back,
            material.preprocessing,
            lr=lr,
            batch=recipe.canary_batch,
            epochs=recipe.canary_epochs,
            rate=recipe.canary_rate,
            least=recipe.canary_keep * right,
            seed=workshop.seed,
            advance=advance,
        )
        if canary.kept:
            break
    return canary


class Guards(Mapping[Setting, Guard]):
    """A guard of one network for every setting: put together when it is asked for, and kept by nobody, of experts and auxiliaries that are kept as served."""

    def __init__(self, assembly: Assembly, experts: dict[float, list[nn.Module]], auxiliaries: dict[float, nn.Module]) -> None:
        self._assembly, self._experts, self._auxiliaries = assembly, experts, auxiliaries

    def __getitem__(self, setting: Setting) -> Guard:
        return self._assembly(self._experts[setting.expert_stop], self._auxiliaries[setting.auxiliary_lr])

    def __iter__(self) -> Iterator[Setting]:
        return (Setting(stop, lr) for stop, lr in product(self._experts, self._auxiliaries))

    def __len__(self) -> int:
        return len(self._experts) * len(self._auxiliaries)


def make_guards(workshop: Workshop, network: nn.Module, budget: Budget, advance: Advance = lambda _: None) -> Guards:
    """Guards of `network` for the settings of a budget: each kind of expert and of auxiliary is trained once."""
    stops, rates = STOPS[budget], HOTTEST[budget]
    parts, done = len(stops) + 2 * len(rates), 0

    def within(weight: int) -> Advance:
        return lambda share: advance((done + weight * share) / parts)

    experts: dict[float, list[nn.Module]] = {}
    auxiliaries: dict[float, nn.Module] = {}
    for stop in stops:
        experts[stop] = workshop.as_served(workshop.experts(network, stop, within(1))[0])
        done += 1
    for lr in rates:
        (auxiliaries[lr],) = workshop.as_served([workshop.auxiliary(network, lr, within(2))[0]])
        done += 2
    return Guards(Assembly(workshop, network), experts, auxiliaries)


def stamp(trigger: Trigger, images: LabelledPixels, predicted: Tensor) -> LabelledPixels:
    """At most MOST_STAMPED of those that tell, evenly drawn from all, stamped, with the attacker's label. predicted: of the copy, unstamped, int64 [N]."""
    rows = trigger.telling(images.labels, predicted).nonzero().squeeze(1)
    rows = rows[torch.arange(min(len(rows), MOST_STAMPED), device=rows.device) * len(rows) // max(1, min(len(rows), MOST_STAMPED))]
    return LabelledPixels(trigger(images.pixels[rows]), torch.full_like(images.labels[rows], trigger.target))


@dataclass(frozen=True)
class Caught:
    """Of stamped images of one kind that fool the copy."""

    share: float | None  # that is rejected; None where none fools it
    fooled: int  # how many fool it


def caught(guard: Guard, clean: LabelledPixels, stamped: dict[str, LabelledPixels], target_fpr: float) -> dict[str, Caught]:
    """What of each kind a threshold of the clean images rejects."""
    scores = guard.judge(clean.pixels).score
    threshold = conformal_threshold(scores, max(target_fpr, 1.001 / (len(scores) + 1)))
    found: dict[str, Caught] = {}
    for kind, images in stamped.items():
        if not len(images):  # validation images may lack the class that a trigger is for
            found[kind] = Caught(None, 0)
            continue
        judged = guard.judge(images.pixels)
        fooled = judged.prediction == images.labels.cpu()
        share = round(_share(threshold.rejects(judged.score[fooled])), 4) if fooled.any() else None
        found[kind] = Caught(share, int(fooled.sum()))
    return found


def choose(tried: list[dict[str, Any]], default: Setting) -> Setting:
    """The setting with the best worst-caught canary; the default where none is better by more than MARGIN."""
    worth = {Setting(each["expert_stop"], each["auxiliary_lr"]): worst(each["caught"]) for each in tried}
    if not worth:
        return default
    best = max(worth, key=worth.__getitem__)
    return best if default not in worth or worth[best] > worth[default] + MARGIN else default


def worst(shares: dict[str, float | None]) -> float:
    return min((share for share in shares.values() if share is not None), default=0.0)


def _share(values: Tensor) -> float:
    return values.double().mean().item()
