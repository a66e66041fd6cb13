"""Presets on small real networks: what happens where training runs away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calibration import presets
from calibration.config import CalibrationConfig, Preset
from calibration.finetune import LabelledPixels, accuracy
from calibration.material import Material
from calibration.progress import Progress, Tracker
from calibration.recipes import AutoRecipe, PaperRecipe, auto_recipe
from calibration.resume import Resume
from calibration.split import Parts
from calibration.workshop import Workshop
from models.errors import TrainingDiverged
from models.preprocessing import Preprocessing
from tests.support import thin_resnet


def material(held_back: bool, network: nn.Module | None = None) -> Material:
    """A network, by default a thin one with random weights, and images whose class is their brightness."""
    torch.manual_seed(0)
    labels = torch.arange(128) % 4
    data = LabelledPixels((labels[:, None, None, None] * 60 + torch.randint(0, 40, (128, 3, 32, 32))).to(torch.uint8), labels)
    suspect = SimpleNamespace(network=(network or thin_resnet(8, 4)).eval(), num_classes=4, architecture=SimpleNamespace(short_name="resnet8"))
    understood: Any = SimpleNamespace(suspect=suspect, preprocessing=Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))
    parts = Parts(np.arange(128), np.arange(0), np.arange(128))
    return Material(understood, data, data if held_back else None, data, parts, torch.device("cpu"))


def train(preset: Preset, given: Material) -> presets.Trained:
    return presets.train(CalibrationConfig(name="g", preset=preset, budget="quick"), given, Tracker(lambda _: None), Resume(None, ""))


@pytest.mark.parametrize("recipe", [PaperRecipe(expert_lr=1e30, expert_batch=32), PaperRecipe(auxiliary_lr=1e30)], ids=["expert", "auxiliary"])
def test_a_published_recipe_that_diverges_is_refused(monkeypatch: pytest.MonkeyPatch, recipe: PaperRecipe) -> None:
    monkeypatch.setattr(presets, "paper_recipe", lambda *_: recipe)
    with pytest.raises(TrainingDiverged, match="auto"):
        train("paper", material(held_back=False))


def test_auto_takes_the_first_learning_rate_that_does_not_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "auto_recipe", lambda _: replace(AutoRecipe(), expert_lrs=(1e30, 1e-3), expert_steps=20, auxiliary_epochs=1))
    trained = train("auto", material(held_back=True))
    assert trained.settings["expert_lr"] == 1e-3
    assert all(value.isfinite().all() for expert in trained.make_guard().experts for value in expert.state_dict().values())


def test_auto_refuses_where_every_learning_rate_diverges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "auto_recipe", lambda _: replace(AutoRecipe(), auxiliary_lr=1e30, auxiliary_lrs=(1e30,), expert_steps=5, auxiliary_epochs=1))
    with pytest.raises(TrainingDiverged):
        train("auto", material(held_back=True))


@pytest.mark.parametrize(("target_fpr", "asked"), [(0.001, 0.03), (0.01, 0.03), (0.05, 0.15)])
def test_the_auxiliary_is_asked_about_three_times_as_many_clean_images_as_may_be_rejected(
    monkeypatch: pytest.MonkeyPatch, target_fpr: float, asked: float
) -> None:
    assert auto_recipe(target_fpr).asked == pytest.approx(asked)
    monkeypatch.setattr(presets, "auto_recipe", lambda target: replace(auto_recipe(target), expert_steps=5, auxiliary_epochs=1))
    given = material(held_back=True)
    guard = presets.train(CalibrationConfig(name="g", budget="quick", target_fpr=target_fpr), given, Tracker(lambda _: None), Resume(None, "")).make_guard()
    assert given.held_back is not None
    reached = (~guard.judge(given.held_back.pixels).auxiliary.isnan()).double().mean().item()
    assert reached == pytest.approx(asked, abs=1.5 / len(given.held_back))


def test_a_network_with_dropout_comes_out_the_same_where_training_was_stopped_in_between(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(presets, "auto_recipe", lambda _: replace(AutoRecipe(), expert_steps=5, auxiliary_epochs=1))

    def given(state: int) -> Material:
        torch.manual_seed(0)
        body = (nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(392, 32), nn.ReLU())
        made = material(held_back=True, network=nn.Sequential(*body, nn.Dropout(0.5), nn.Linear(32, 4)))
        torch.manual_seed(state)
        return made

    config = CalibrationConfig(name="g", budget="quick")

    def stop(progress: Progress) -> None:
        if progress.stage == "auxiliary":
            raise KeyboardInterrupt

    def weights(trained: presets.Trained) -> list[torch.Tensor]:
        return list(trained.make_guard().state_dict().values())

    at_once = weights(train("auto", given(1)))
    with pytest.raises(KeyboardInterrupt):
        presets.train(config, given(1), Tracker(stop), Resume(tmp_path, "a"))
    resume = Resume(tmp_path, "a")
    in_parts = weights(presets.train(config, given(2), Tracker(lambda _: None), resume))
    assert resume.taken == ["expert"]
    assert all(torch.equal(a, b) for a, b in zip(at_once, in_parts, strict=True))


@pytest.mark.parametrize(
    ("right", "setting", "stop"), [(84, 0.2, 0.2), (84, 0.4, 0.4), (60, 0.4, 0.4), (40, 0.2, 0.2), (50, 0.4, 0.3), (30, 0.2, 0.15), (10, 0.2, 0.05)]
)
def test_an_expert_of_a_suspect_that_gets_little_right_has_to_forget_half_of_it(right: int, setting: float, stop: float) -> None:
    labels = torch.tensor([0] * right + [1] * (100 - right))
    data = LabelledPixels(torch.zeros(100, 3, 8, 8, dtype=torch.uint8), labels)
    zero = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    zero[1].weight.data.zero_()
    zero[1].bias.data.copy_(torch.tensor([1.0, 0.0]))
    given = replace(material(held_back=True, network=zero), fit=data, held_back=data)
    assert Workshop(AutoRecipe(), given, data, None, 0).stop_at(zero, setting) == pytest.approx(stop)


def test_the_report_says_where_the_experts_of_a_weak_suspect_were_stopped() -> None:
    """One that gets 25% of four classes right; at the default of 20% its experts would have ended at their first look, with the task as it was."""
    given = material(held_back=True)
    trained = train("auto", given)
    assert given.held_back is not None
    suspect = accuracy(given.network, given.held_back, given.preprocessing)
    assert 0.2 < suspect <= 0.3
    assert trained.settings["expert_stop"] == suspect / 2
    assert all(curve.accuracy[-1] <= suspect / 2 < 0.2 for curve in trained.expert_curves)
