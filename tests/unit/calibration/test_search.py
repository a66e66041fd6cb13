"""The choice of settings: by the canary that is caught worst, and the default where luck could explain the difference."""

from __future__ import annotations

import pytest
import torch

from calibration.canary import draw
from calibration.finetune import LabelledPixels
from calibration.search import MARGIN, MOST_STAMPED, Setting, caught, choose, stamp, worst
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
    stamped = stamp(draw("warp", 3, None, 8, 0), LabelledPixels(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), labels))
    assert len(stamped) == min(int((labels != 3).sum()), MOST_STAMPED)
    assert (stamped.labels == 3).all()
    which = stamp(draw("patch", 3, None, 8, 0), LabelledPixels(labels.to(torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8), labels)).pixels[:, 0, 0, 0]
    assert set(which.tolist()) == set(labels[labels != 3].tolist())


def test_a_kind_for_which_there_is_no_image_is_not_judged() -> None:
    images = LabelledPixels(PIXELS[:40], torch.zeros(40, dtype=torch.int64))
    none = LabelledPixels(PIXELS[:0], images.labels[:0])
    found = caught(untrained_guard(), images, {"patch": images, "sourced": none}, 0.05)
    assert found["sourced"] is None
    assert found.keys() == {"patch", "sourced"}


def test_without_canaries_the_default_is_taken() -> None:
    assert choose([], DEFAULT) == DEFAULT


def test_nothing_that_fools_is_nothing_caught() -> None:
    assert worst({"patch": None}) == 0.0
