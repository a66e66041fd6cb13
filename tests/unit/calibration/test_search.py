"""The choice of settings: by the canary that is caught worst, and the default where luck could explain the difference."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calibration import canary as canaries
from calibration import checks, fusion
from calibration.canary import draw
from calibration.finetune import LabelledPixels
from calibration.material import Material
from calibration.recipes import AutoRecipe
from calibration.resume import Resume
from calibration.search import MARGIN, MOST_STAMPED, Caught, Setting, caught, choose, make_guards, plant_by_recipe, search, stamp, worst
from calibration.split import Parts
from calibration.workshop import Workshop, choose_cuts
from models import guard
from models.preprocessing import Preprocessing
from tests.support import thin_resnet
from tests.untrained import PIXELS, untrained_guard

DEFAULT, OTHER = Setting(0.2, 0.1), Setting(0.4, 0.03)


def tried(default: dict[str, float | None], other: dict[str, float | None]) -> list[dict[str, object]]:
    return [{**vars(setting), "caught": caught} for setting, caught in ((DEFAULT, default), (OTHER, other))]


@pytest.mark.parametrize(
    ("default", "other", "best"),
    [
        ({"patch": 1.0, "warp": 0.3}, {"patch": 0.9, "warp": 0.5}, OTHER),  # the worst decides, not the mean
        ({"patch": 1.0, "warp": 0.5}, {"patch": 1.0, "warp": 0.5 + MARGIN / 2}, DEFAULT),
        ({"patch": 1.0, "warp": 0.5}, {"patch": 1.0, "warp": 0.4}, DEFAULT),
        ({"patch": 0.4, "warp": None}, {"patch": 0.6, "warp": None}, OTHER),  # what fools nobody says nothing
    ],
)
def test_the_best_worst_case_wins_by_more_than_luck(default: dict[str, float | None], other: dict[str, float | None], best: Setting) -> None:
    assert choose(tried(default, other), DEFAULT) == best


@pytest.mark.parametrize("count", [0, 1, 499, 501, 1700])
def test_stamped_images_are_of_all_classes_and_of_bounded_number(count: int) -> None:
    labels = torch.arange(count).sort().values * 10 // max(1, count)  # class after class, as in a folder
    nobody = torch.full_like(labels, 10)
    stamped = stamp(draw("warp", 3, None, 8, 0), LabelledPixels(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), labels), nobody)
    assert len(stamped) == min(int((labels != 3).sum()), MOST_STAMPED)
    assert (stamped.labels == 3).all()
    coded = LabelledPixels(labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8), labels)
    which = stamp(draw("patch", 3, None, 8, 0), coded, nobody).pixels[:, 0, 0, 0]
    assert set(which.tolist()) == set(labels[labels != 3].tolist())


def test_a_kind_for_which_there_is_no_image_is_not_judged() -> None:
    images = LabelledPixels(PIXELS[:40], torch.zeros(40, dtype=torch.int64))
    none = LabelledPixels(PIXELS[:0], images.labels[:0])
    found = caught(untrained_guard(), images, {"patch": images, "sourced": none}, 0.05)
    assert found["sourced"] == Caught(None, 0)
    assert found.keys() == {"patch", "sourced"}


def test_images_that_the_copy_takes_for_the_target_as_they_are_do_not_count() -> None:
    images = LabelledPixels(PIXELS[:40], torch.arange(40) % 10)
    assert len(stamp(draw("patch", 3, None, 32, 0), images, torch.tensor([3] * 20 + [5] * 20))) == 18
    assert len(stamp(draw("sourced", 3, 4, 32, 0), images, torch.tensor([3] * 20 + [5] * 20))) == 2


def workshop(network: nn.Module, **constants: Any) -> Workshop:
    """Images whose class is their brightness, for a network of four."""
    labels = torch.arange(256) % 4
    noise = torch.randint(0, 40, (256, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    data = LabelledPixels((labels[:, None, None, None] * 60 + noise).to(torch.uint8), labels)
    understood: Any = SimpleNamespace(suspect=SimpleNamespace(network=network.eval(), num_classes=4), preprocessing=Preprocessing())
    given = Material(understood, data, data, data, Parts(np.arange(256), np.arange(0), np.arange(256)), torch.device("cpu"))
    return Workshop(replace(AutoRecipe(), **constants), given, data, None, 0)


def test_canaries_are_planted_at_the_first_rate_that_leaves_the_copy_its_task() -> None:
    torch.manual_seed(0)
    given, trigger = workshop(thin_resnet(8, 4), canary_lrs=(1e30, 0.05, 0.01), canary_epochs=4), draw("patch", 1, None, 32, 0)
    canary = plant_by_recipe(given, (trigger,), 0.5, lambda _: None)
    assert (canary.lr, canary.kept) == (0.05, True)
    assert canary.accuracy > 0.5


def test_where_no_rate_leaves_the_copy_its_task_nothing_was_planted_and_the_default_is_taken() -> None:
    torch.manual_seed(0)
    bench = workshop(thin_resnet(8, 4), canary_lrs=(1e30, 1e20), canary_epochs=1)
    found = search(bench, "standard", 0.05, Resume(None, ""), lambda _: None)
    assert (found.chosen, found.tried) == (DEFAULT, [])
    assert {(each.took, each.why_not, each.power) for each in found.canaries} == {(False, "the copy lost the task", None)}
    assert found.copy["accuracy"] < 0.75 * found.copy["suspect_accuracy"]


def test_where_the_guard_of_the_copy_cannot_be_trained_the_default_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suspect's own may be."""
    torch.manual_seed(0)
    monkeypatch.setattr(canaries, "TOOK", 0.0)  # however few obey after so little training
    bench = workshop(thin_resnet(8, 4), canary_lrs=(0.05,), canary_epochs=4, expert_lrs=(1e30,), expert_steps=5)
    found = search(bench, "standard", 0.05, Resume(None, ""), lambda _: None)
    assert (found.chosen, found.tried) == (DEFAULT, [])
    assert not any(each.took for each in found.canaries)
    caution = checks.no_canary_took(found.canaries, found.copy)
    assert caution is not None
    assert "tells anything: the training of the copy's guard diverged (" in caution.detail


def test_guards_of_all_settings_share_what_is_the_networks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what a guard made alone would be; the network is folded once, and distances are fitted once to each place."""
    torch.manual_seed(0)
    suspect = thin_resnet(8, 4).eval()
    bench = workshop(suspect, expert_steps=5, auxiliary_epochs=1, experts=1)
    cuts, _ = choose_cuts(suspect, bench.material.preprocessing.normalise(bench.material.fit.pixels[:1]), bench.recipe)
    assert cuts is not None
    bench = replace(bench, cuts=cuts)
    (expert,), _, _ = bench.experts(suspect, 0.4, lambda _: None)
    auxiliary, _, _ = bench.auxiliary(suspect, 0.03, lambda _: None)
    calls = Counter[str]()

    def counted(module: ModuleType, name: str) -> None:
        plain = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: (calls.update([name]), plain(*given))[1])

    counted(guard, "folded")
    counted(fusion, "fit_distance")
    guards = make_guards(bench, suspect, "standard")
    made = list(guards.values())
    assert list(guards) == [Setting(stop, lr) for stop in (0.2, 0.4) for lr in (0.1, 0.03)]
    assert calls == {"folded": len(cuts.all) + 1, "fit_distance": len(cuts.places)}
    assert len({id(part) for each in made for part in each.parts}) == len(cuts.all) + 1
    alone = bench.guard(suspect, [expert], auxiliary)
    assert made[-1].scales == alone.scales
    assert made[-1].scales != made[0].scales
    assert all(value.equal(alone.state_dict()[name]) for name, value in made[-1].state_dict().items())
    one, other = (each.judge(bench.held_back.pixels).score for each in (made[-1], alone))
    assert one.equal(other)


def test_without_canaries_the_default_is_taken() -> None:
    assert choose([], DEFAULT) == DEFAULT


def test_nothing_that_fools_is_nothing_caught() -> None:
    assert worst({"patch": None}) == 0.0
