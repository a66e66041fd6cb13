"""What `auto` makes out of a network, which is the suspect or a copy with canaries: experts, an auxiliary, the guard of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from calibration.finetune import Advance, Curve, LabelledPixels, accuracy, finite, train_auxiliary, train_tails
from calibration.fusion import equipped, fit_distances, fuse
from calibration.material import Material
from calibration.recipes import AutoRecipe
from models import trunk
from models.errors import TrainingDiverged
from models.guard import Cuts, Guard
from models.lowering import lowered


@dataclass(frozen=True)
class Workshop:
    """The images, the cuts and the constants, which are the same for every network."""

    recipe: AutoRecipe
    material: Material
    held_back: LabelledPixels
    cuts: Cuts | None
    seed: int

    @property
    def cut(self) -> str | None:
        return None if self.cuts is None else self.cuts.experts

    def stop_at(self, network: nn.Module, setting: float) -> float:
        """The held-back accuracy at which experts of `network` are stopped: the setting, or less where the network itself gets hardly more right."""
        right = accuracy(network.eval(), self.held_back, self.material.preprocessing)
        return min(setting, right - min(self.recipe.expert_forgets, right / 2))

    def experts(self, network: nn.Module, setting: float, advance: Advance) -> tuple[list[nn.Module], list[Curve], float]:
        """Experts that were stopped as `stop_at` says, with their curves and the learning rate. Raises TrainingDiverged."""
        stop = self.stop_at(network, setting)
        for lr in self.recipe.expert_lrs:
            tails, curves = train_tails(
                network,
                self.cut,
                self.recipe.experts,
                self.material.fit,
                self.held_back,
                self.material.num_classes,
                self.material.preprocessing,
                lr=lr,
                batch=self.recipe.expert_batch,
                stop_at=stop,
                max_steps=self.recipe.expert_steps,
                seed=self.seed,
                advance=advance,
            )
            if finite(tails):
                return tails, curves, lr
        raise TrainingDiverged

    def auxiliary(self, network: nn.Module, hottest: float, advance: Advance) -> tuple[nn.Module, Curve, float]:
        """The auxiliary of the hottest learning rate, from `hottest` on, that keeps the task, with its curve. Raises TrainingDiverged."""
        keep = self.recipe.auxiliary_keep * accuracy(network.eval(), self.held_back, self.material.preprocessing)
        for lr in (rate for rate in self.recipe.auxiliary_lrs if rate <= hottest):
            auxiliary, curve = train_auxiliary(
                network,
                self.material.fit,
                self.held_back,
                self.material.preprocessing,
                lr=lr,
                batch=self.recipe.auxiliary_batch,
                epochs=self.recipe.auxiliary_epochs,
                steps_at=self.recipe.auxiliary_steps,
                decay=self.recipe.auxiliary_decay,
                seed=self.seed,
                advance=advance,
                hopeless=self.recipe.auxiliary_hopeless * keep,
            )
            if curve.accuracy[-1] >= keep:
                break
        if not finite([auxiliary]):
            raise TrainingDiverged
        return auxiliary, curve, lr

    def guard(self, network: nn.Module, experts: Sequence[nn.Module], auxiliary: nn.Module) -> Guard:
        """With the fused score where the network can be cut, with the published one where not."""
        return Assembly(self, network)(self.as_served(experts), *self.as_served([auxiliary]))

    def as_served(self, networks: Sequence[nn.Module]) -> list[nn.Module]:
        """Experts or auxiliaries as a guard has them; without cuts, as they are."""
        return list(networks) if self.cuts is None else [lowered(network, self.material.device) for network in networks]


class Assembly:
    """Puts guards of one network together, whose training is over. What they share is made once: the folded network and the distances of its features."""

    def __init__(self, workshop: Workshop, network: nn.Module) -> None:
        self._workshop, material = workshop, workshop.material
        self._bare = Guard(network, [], nn.Identity(), material.preprocessing, cuts=workshop.cuts, c=workshop.recipe.c)
        self._distances = [] if workshop.cuts is None else fit_distances(self._bare, material.fit, material.num_classes)

    def __call__(self, experts: Sequence[nn.Module], auxiliary: nn.Module) -> Guard:
        """Experts and auxiliary are as `Workshop.as_served` gives them."""
        guard = equipped(self._bare, experts, auxiliary)
        return guard if self._workshop.cuts is None else fuse(guard, self._distances, self._workshop.held_back, self._workshop.recipe.asked)


def choose_cuts(network: nn.Module, example: Tensor, recipe: AutoRecipe) -> tuple[Cuts | None, float]:
    """Where to cut, and the share of the network behind it. None for a network that cannot be: its experts are then whole copies of it."""
    try:
        cut = trunk.choose_cut(network, example, recipe.tail_share)
        places = trunk.places(network, example, (recipe.tail_share, *recipe.distance_shares))
        return Cuts(experts=cut.name, places=tuple(place.name for place in places)), cut.tail_share
    except trunk.CannotCut:
        return None, 1.0
