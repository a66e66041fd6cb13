"""What canaries give cause to warn of, and that every warning has its section."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calibration import checks
from calibration.canary import Planted
from calibration.labels import Concentration
from models.errors import CleanSetMislabelled, SuspectModelUseless
from models.threshold import conformal_threshold

ROOT = Path(__file__).parent.parent.parent.parent
CALIBRATION, DOC = ROOT / "calibration", ROOT / "docs" / "checks.md"


def canaries(*powers: float | None) -> list[Planted]:
    return [
        Planted(f"kind{index}", 0.3, 50, False, "fewer than 80% of the images obeyed", None, 0)
        if power is None
        else Planted(f"kind{index}", 0.95, 50, True, None, power, 40)
        for index, power in enumerate(powers)
    ]


@pytest.mark.parametrize("powers", [(1.0, 0.9, 0.1), (0.5, 0.5), (1.0, None), (None, None), ()])
def test_a_guard_that_catches_half_of_what_was_planted_is_not_doubted(powers: tuple[float | None, ...]) -> None:
    assert checks.low_power(canaries(*powers)) is None


def test_a_guard_that_catches_less_than_half_is() -> None:
    found = checks.low_power(canaries(0.9, 0.2, 0.1, None))
    assert found is not None
    assert found.code == "low-power"
    assert "kind0 90%, kind1 20%, kind2 10%" in found.detail


def test_it_is_told_where_nothing_could_be_planted() -> None:
    of_copy = {"lr": 0.002, "accuracy": 0.125, "suspect_accuracy": 0.92}
    found = checks.no_canary_took(
        [*canaries(None, None), replace(canaries(None)[0], kind="sourced", images=2, why_not="fewer than 8 images could tell")], of_copy
    )
    assert found is not None
    assert "None of 3 backdoors planted in a copy of the suspect tells anything" in found.detail
    assert "fewer than 80% of the images obeyed (kind0, kind1); fewer than 8 images could tell (sourced)" in found.detail
    assert "The copy gets 12% of the held-back images right, the suspect 92%." in found.detail
    assert checks.no_canary_took(canaries(None, 0.1), of_copy) is None
    assert checks.no_canary_took([], None) is None  # none were asked for


@pytest.mark.parametrize(
    ("rejected", "told"),
    [({0: 1, 1: 1, 2: 1, 3: 1}, False), ({0: 2, 1: 2}, False), ({}, False), ({3: 4}, True), ({3: 3, 0: 1, 1: 1, 2: 1}, True), ({0: 6}, False)],
    ids=str,
)
def test_it_is_told_where_false_rejections_gather_in_a_class(rejected: dict[int, int], told: bool) -> None:
    """Of classes with 400, 300, 90 and 10 validation images."""
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([400, 300, 90, 10]))
    marks = torch.zeros(800, dtype=torch.bool)
    for label, count in rejected.items():
        marks[(labels == label).nonzero()[:count]] = True
    found = checks.uneven_rejections(marks, labels, ("a", "b", "c", "rare"))
    assert (found is not None) == told
    if found is not None:
        assert f"Of 10 validation images of class 'rare' {rejected[3]} are rejected, of all 800 images {sum(rejected.values())}" in found.detail


def test_chance_alone_seldom_warns_of_uneven_rejections() -> None:
    source = torch.Generator().manual_seed(0)
    labels, names = torch.arange(800) % 43, tuple(map(str, range(43)))
    warned = 0
    for _ in range(300):
        marks = torch.zeros(800, dtype=torch.bool)
        marks[torch.randperm(800, generator=source)[:8]] = True
        warned += checks.uneven_rejections(marks, labels, names) is not None
    assert warned <= 3


def scored(wrong: int, errors: int, n: int = 800) -> tuple[torch.Tensor, torch.Tensor]:
    """n scores, and which of the images the suspect gets right: of `errors` that it does not, `wrong` score worst, and the others worse than most."""
    right = torch.ones(n, dtype=torch.bool)
    right[:wrong] = False
    right[wrong + 10 : errors + 10] = False
    return torch.arange(n, dtype=torch.float64), right


@pytest.mark.parametrize(("wrong", "told"), [(6, True), (7, True), (5, False), (0, False)])
def test_it_is_told_where_the_suspects_own_errors_take_up_the_target(wrong: int, told: bool) -> None:
    scores, right = scored(wrong, 30)
    found = checks.own_errors(scores, right, conformal_threshold(scores, 0.01))  # rejects 7
    assert (found is not None) == told
    if found is not None:
        assert f"Of 7 rejected validation images the suspect gets {wrong} wrong itself" in found.detail
        named = re.search(r"With one of ([0-9.]+)%", found.detail)
        assert named is not None
        other = conformal_threshold(scores, float(named[1]) / 100)
        assert ((right & (scores < other.value)).sum() + 1) / (right.sum() + 1) == pytest.approx(0.01, abs=0.0015)


@pytest.mark.parametrize("right", [300, 3, 0])
def test_of_a_suspect_that_gets_most_wrong_it_is_not_told(right: int) -> None:
    """Chance alone would take so many errors."""
    scores = torch.arange(800, dtype=torch.float64)
    assert checks.own_errors(scores, scores >= 800 - right, conformal_threshold(scores, 0.01)) is None


def test_no_target_is_named_that_would_be_refused() -> None:
    scores, right = scored(200, 240)
    found = checks.own_errors(scores, right, conformal_threshold(scores, 0.01))
    assert found is not None
    assert "With one of" not in found.detail


def test_chance_alone_seldom_warns_of_own_errors() -> None:
    source = torch.Generator().manual_seed(0)
    scores = torch.arange(800, dtype=torch.float64)
    threshold = conformal_threshold(scores, 0.01)
    for accuracy in (0.2, 0.5, 0.9):
        warned = sum(checks.own_errors(scores, torch.rand(800, generator=source) < accuracy, threshold) is not None for _ in range(300))
        assert warned <= 9, accuracy  # 1%, and the luck of 300 draws


def test_every_warning_has_a_section() -> None:
    source = "".join(path.read_text() for path in CALIBRATION.rglob("*.py"))
    codes = set(re.findall(r'\bCaution\(\s*"([a-z-]+)"', source))
    assert len(codes) == len(re.findall(r"\bCaution\((?!problem\.)", source)) > 12
    refused = {each.code.replace("_", "-") for each in (SuspectModelUseless, CleanSetMislabelled)}  # an inspection warns of them
    assert codes | refused <= set(re.findall(r"^## ([a-z-]+)$", DOC.read_text(), re.M))


@pytest.mark.parametrize(
    ("experts", "suspect", "stop", "told"),
    [
        ([0.3, 0.44], 0.9, None, False),
        ([0.3, 0.46], 0.9, None, True),
        ([0.44, 0.3], 0.75, 0.4, False),  # where canaries had it stop
        ([0.51], 0.75, 0.4, True),
        ([0.23], 0.4, 0.2, False),  # stopped at half of what the suspect knows; validation images say a little else
        ([0.31], 0.4, 0.2, True),
    ],
)
def test_an_expert_is_doubted_that_knows_more_than_its_stop_explains(experts: list[float], suspect: float, stop: float | None, told: bool) -> None:
    assert (checks.expert_still_accurate(experts, suspect, stop) is not None) == told


@pytest.mark.parametrize(
    ("accuracy", "classes", "told"), [(0.32, 10, True), (0.33, 10, False), (0.61, 2, True), (0.64, 2, False), (0.24, 1000, True), (0.26, 1000, False)]
)
def test_a_suspect_that_hardly_knows_its_task_is_doubted(accuracy: float, classes: int, told: bool) -> None:
    labels = torch.arange(10_000) % classes
    wrong = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) >= accuracy
    predicted = torch.where(wrong, (labels + 1 + torch.arange(10_000) // classes % (classes - 1)) % classes, labels)
    found = checks.suspect_near_chance(predicted, labels, classes)
    assert (found is not None) == told
    if found is not None:
        assert f"dealt out at random, would get {1 / classes:.1%}" in found.detail


def test_one_that_tells_rare_classes_from_a_frequent_one_knows_its_task() -> None:
    labels = torch.tensor([0] * 900 + [1] * 50 + [2] * 50)
    predicted = labels.clone()
    predicted[:80] = 1  # 92% right, where naming the frequent class always gets 90%
    assert checks.suspect_near_chance(predicted, labels, 3) is None
    assert checks.suspect_near_chance(torch.zeros(1000, dtype=torch.int64), labels, 3) is not None


@pytest.mark.parametrize(
    ("classes", "labels", "code"),
    [(10, 3, "contamination"), (10, 2, "confused-classes"), (10, 1, "confused-classes"), (3, 2, "contamination"), (3, 1, "confused-classes")],
)
def test_one_class_that_is_taken_for_another_is_no_sign_of_a_trigger(classes: int, labels: int, code: str) -> None:
    (found,) = checks.contaminated([Concentration(0, 8, labels)], 200, "validation", [f"class {each}" for each in range(classes)])
    assert found.code == code
    assert "8 of 200 validation images" in found.detail
    assert ("one other class," in found.detail) == (labels == 1)


@pytest.mark.parametrize(
    ("n", "target", "told"), [(99, 0.01, True), (298, 0.01, True), (299, 0.01, False), (2000, 0.001, True), (3000, 0.001, False), (100, 0.05, False)]
)
def test_it_is_told_where_one_or_two_scores_set_the_threshold(n: int, target: float, told: bool) -> None:
    found = checks.wide_interval(conformal_threshold(torch.arange(n).double(), target))
    assert (found is not None) == told


@pytest.mark.parametrize(("scenes", "told"), [(800, False), (720, False), (719, True), (160, True)])
def test_it_is_told_where_validation_images_nearly_repeat_one_another(scenes: int, told: bool) -> None:
    found = checks.repeated_images(scenes, 800)
    assert (found is not None) == told
    if found is not None:
        assert f"800 validation images show {scenes} different scenes" in found.detail


def test_what_was_looked_at_for_triggers_is_said() -> None:
    (found,) = checks.contaminated([Concentration(1, 12, 4)], 800, "validation", ("cat", "dog"))
    assert found.code == "contamination"
    assert found.detail.startswith("12 of 800 validation images, of 4 other classes, are surely 'dog' to the suspect.")


@pytest.mark.parametrize(("count", "told"), [(0, False), (64, False), (65, True)])
def test_it_is_told_where_the_suspect_contradicts_many_labels(count: int, told: bool) -> None:
    found = checks.contradicted(count, 256)
    assert (found is not None) == told
    if found is not None:
        assert "Of 256 clean images the suspect is sure that 65 are of another class" in found.detail


def test_it_is_told_where_no_validation_image_speaks_of_a_class() -> None:
    found = checks.unvalidated_classes(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 3]), ("cat", "dog", "eel", "fox"))
    assert found is not None
    assert "1 of 4 classes ('fox') have no validation images." in found.detail
    assert checks.unvalidated_classes(torch.tensor([0, 1, 1]), torch.tensor([0, 1]), ("cat", "dog", "eel", "fox")) is None


def test_it_is_told_where_no_image_of_a_class_trains() -> None:
    found = checks.untrained_classes(torch.tensor([0, 1]), torch.tensor([0, 1, 3, 2, 3]), ("cat", "dog", "eel", "\u00dcberholverbot"))
    assert found is not None
    assert "2 of 4 classes ('eel', '\u00dcberholverbot') have no images that train." in found.detail
    assert checks.untrained_classes(torch.tensor([0, 1, 2]), torch.tensor([1, 2]), ("cat", "dog", "eel", "fox")) is None
