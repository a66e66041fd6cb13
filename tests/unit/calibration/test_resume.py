"""What a stopped calibration had made is taken again where it fits, and only there."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from calibration import resume
from calibration.resume import Made, Resume, fingerprint
from models import bundle


def blank() -> list[nn.Module]:
    return [nn.Linear(3, 2), nn.BatchNorm1d(2)]


def make() -> Made:
    return [network.eval() for network in blank()], {"lr": 0.1, "loss": [0.3, 1e-17]}


def never() -> Made:
    raise AssertionError("was made again")


def test_a_stage_is_made_once(tmp_path: Path) -> None:
    made, known = Resume(tmp_path / "kept", "a").networks("expert", blank, make)
    again = Resume(tmp_path / "kept", "a")
    kept, known_again = again.networks("expert", blank, never)
    assert known_again == known
    assert again.taken == ["expert"]
    for one, other in zip(made, kept, strict=True):
        assert not other.training
        assert all(one.state_dict()[name].equal(value) for name, value in other.state_dict().items())
    again.done()
    assert not (tmp_path / "kept").exists()


def test_what_another_calibration_kept_is_not_taken_and_stays(tmp_path: Path) -> None:
    """Two of one name may run beside one another, and one that ends takes nothing from the other."""
    folder = tmp_path / "kept"
    Resume(folder, "a").networks("expert", blank, make)
    with pytest.raises(AssertionError, match="made again"):
        Resume(folder, "b").networks("expert", blank, never)
    other = Resume(folder, "b")
    other.networks("expert", blank, make)
    other.done()
    last = Resume(folder, "a")
    last.networks("expert", blank, never)
    last.done()
    assert not folder.exists()


def test_what_nobody_went_on_with_for_a_week_is_given_up(tmp_path: Path) -> None:
    folder, old, young = tmp_path / "kept", "0" * 16, "1" * 16
    for name in (old, young):
        Resume(folder, name).networks("expert", blank, make)
    (folder / "letters").mkdir()  # of somebody who keeps other things there
    for path in (folder / old, folder / "letters"):
        os.utime(path, (0, 0))
    Resume(folder, "a").done()
    assert {path.name for path in folder.iterdir()} == {young, "letters"}


def test_what_was_kept_under_another_calibrations_name_is_not_taken(tmp_path: Path) -> None:
    Resume(tmp_path, "a").networks("expert", blank, make)
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(AssertionError, match="made again"):
        Resume(tmp_path, "b").networks("expert", blank, never)


@pytest.mark.parametrize("damage", [b"", b"\x08", bytes(100)])
def test_a_file_that_cannot_be_read_is_made_again(tmp_path: Path, damage: bytes) -> None:
    Resume(tmp_path, "a").networks("expert", blank, make)
    (tmp_path / "a" / "expert.safetensors").write_bytes(damage)
    Resume(tmp_path, "a").networks("expert", blank, make)
    Resume(tmp_path, "a").networks("expert", blank, never)


def test_a_network_of_another_shape_is_made_again(tmp_path: Path) -> None:
    Resume(tmp_path, "a").networks("expert", blank, make)
    with pytest.raises(AssertionError, match="made again"):
        Resume(tmp_path, "a").networks("expert", lambda: [nn.Linear(4, 2)], never)


def test_without_a_folder_nothing_is_kept() -> None:
    nowhere = Resume(None, "")
    nowhere.networks("expert", blank, make)
    with pytest.raises(AssertionError, match="made again"):
        nowhere.networks("expert", blank, never)
    nowhere.done()


@pytest.mark.parametrize(("owner", "name"), [(bundle, "SCHEMA"), (resume, "HOW")])
def test_what_was_kept_before_the_score_or_the_training_changed_is_not_taken(monkeypatch: pytest.MonkeyPatch, owner: ModuleType, name: str) -> None:
    before = fingerprint(["auto"], [])
    monkeypatch.setattr(owner, name, getattr(owner, name) + 1)
    assert fingerprint(["auto"], []) != before


def test_a_fingerprint_tells_every_bit(tmp_path: Path) -> None:
    weights = torch.arange(6.0).view(2, 3)
    first = fingerprint(["auto", 0, {"lr": 0.1}], [weights, torch.tensor(1)])
    assert first == fingerprint(["auto", 0, {"lr": 0.1}], [weights.t().contiguous().t(), torch.tensor(1)])
    others = [
        fingerprint(["auto", 1, {"lr": 0.1}], [weights, torch.tensor(1)]),
        fingerprint(["auto", 0, {"lr": 0.1}], [weights + 1e-6, torch.tensor(1)]),
        fingerprint(["auto", 0, {"lr": 0.1}], [weights.flatten(), torch.tensor(1)]),
    ]
    assert first not in others
