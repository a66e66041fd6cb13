"""What labels and outputs say of each other, on outputs made to order; real suspects are in test_preprocessing.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calibration.labels import at_chance, check_labels, contamination, speaks_of
from models.errors import CleanSetMislabelled, SuspectModelUseless
from models.guard import answer

NAMES = [f"class {i}" for i in range(10)]


def answers(classes: Tensor, right: float = 0.9) -> Tensor:
    """Sure logits [N, 10] for these classes, for a random one in the other cases."""
    draw = torch.Generator().manual_seed(0)
    wrong = torch.randint(10, classes.shape, generator=draw)
    said = torch.where(torch.rand(classes.shape, generator=draw) < right, classes, wrong)
    return 6 * torch.nn.functional.one_hot(said, 10).float()


@pytest.fixture
def truth() -> Tensor:
    return torch.arange(200) % 10


def test_the_suggested_order_is_indexed_by_output(truth: Tensor) -> None:
    labels = torch.randperm(10, generator=torch.Generator().manual_seed(1))[truth]
    order = check_labels(answers(truth), labels, NAMES)
    assert order is not None
    assert [order.names[output] for output in truth.tolist()] == [NAMES[label] for label in labels.tolist()]
    assert order.accuracy > 0.8 > 0.3 > order.given


def test_labels_of_chance_get_no_order_however_few_there_are_of_each_class() -> None:
    labels = torch.randint(10, (100,), generator=torch.Generator().manual_seed(2))
    with pytest.raises(CleanSetMislabelled):
        check_labels(answers(torch.arange(100) % 10), labels, NAMES)


def test_a_suspect_that_is_not_decided_is_useless(truth: Tensor) -> None:
    with pytest.raises(SuspectModelUseless):
        check_labels(torch.randn(200, 10, generator=torch.Generator().manual_seed(3)) / 10, truth, NAMES)


def test_chance_is_what_the_largest_class_gives() -> None:
    labels = torch.tensor([0] * 150 + [1] * 50)
    assert at_chance(0.75, labels)
    assert not at_chance(0.95, labels)


def two_classes(first: int, second: int, wrong_first: int, wrong_second: int) -> tuple[Tensor, Tensor]:
    """Sure logits [N, 2] and labels [N] of so many images of each class, so many of which are taken for the other."""
    labels = torch.tensor([0] * first + [1] * second)
    said = labels.clone()
    said[:wrong_first], said[first : first + wrong_second] = 1, 0
    return 6 * torch.nn.functional.one_hot(said, 2).float(), labels


@pytest.mark.parametrize(
    ("images", "speaks"),
    [
        ((128, 128, 31, 31), True),
        ((180, 76, 21, 22), True),
        ((208, 48, 12, 13), True),
        ((243, 13, 2, 6), True),
        ((128, 128, 60, 60), False),
        ((208, 48, 0, 48), False),
        ((208, 48, 39, 39), False),
        ((500, 500, 225, 225), False),
    ],
    ids=["even", "uneven", "four fifths", "nineteen twentieths", "a little better than a coin", "constant", "dealt out at random", "surely better, but hardly"],
)
def test_a_weak_suspect_of_two_classes_is_told_from_none(images: tuple[int, int, int, int], speaks: bool) -> None:
    logits, labels = two_classes(*images)
    assert speaks_of(logits, labels) == speaks
    if speaks:
        assert check_labels(logits, labels, ("sound", "broken")) is None


def test_triggered_images_are_named_and_their_target_too(truth: Tensor) -> None:
    shown = truth.clone()
    shown[1:120:6] = 3  # twenty images of several classes that the suspect takes for class 3
    found = contamination(*answer(answers(shown, right=1.0)), truth, 10)
    assert {hint.row for hint in found.contradictions} == set(torch.nonzero(shown != truth).flatten().tolist())
    assert [concentration.predicted for concentration in found.concentrations] == [3]
    assert found.concentrations[0].labels > 2
    assert contamination(*answer(answers(truth, right=1.0)), truth, 10).contradictions == ()


def test_thousands_of_contradictions_can_be_counted() -> None:
    labels = torch.arange(20_000) % 10
    predicted = torch.where(torch.arange(20_000) % 6 == 0, (labels + 1) % 10, labels)
    predicted[::50] = 3
    found = contamination(torch.ones(20_000), predicted, labels, 10)
    assert len(found.contradictions) > 3000
    assert [each.predicted for each in found.concentrations] == [3]
    none = contamination(torch.ones(100), torch.zeros(100, dtype=torch.int64), torch.arange(100) % 2, 2)  # a share of 1
    assert len(none.contradictions) == 50
