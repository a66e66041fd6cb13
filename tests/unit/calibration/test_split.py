"""Parts of a clean set are disjoint, stratified, seeded, and large enough for what is promised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.split import sample, split
from models.errors import FprUnreachable


def labels_of(n: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, classes, n)


@given(n=st.integers(200, 3000), classes=st.integers(2, 50), seed=st.integers(0, 99))
def test_every_image_is_in_exactly_one_part(n: int, classes: int, seed: int) -> None:
    parts = split(labels_of(n, classes), np.arange(n), 0.01, 0.15, seed)
    together = np.concatenate([parts.fit, parts.held_back, parts.validation])
    assert sorted(together.tolist()) == list(range(n))
    assert len(parts.validation) >= 99


@given(n=st.integers(400, 2000), seed=st.integers(0, 20))
def test_duplicates_are_never_on_both_sides(n: int, seed: int) -> None:
    groups = np.random.default_rng(seed).integers(0, n // 2, n)
    parts = split(labels_of(n, 10), groups, 0.01, 0.15, seed)
    sides = [set(groups[rows].tolist()) for rows in (parts.fit, parts.held_back, parts.validation)]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


@pytest.mark.parametrize("size", [1, 2, 5, 10, 30])
def test_large_groups_take_no_more_than_their_share(size: int) -> None:
    groups = np.arange(1800) // size
    parts = split(groups % 10, groups, 0.01, 0.15, 0)
    assert (len(parts.validation), len(parts.held_back)) == (720, 162 if size in (1, 2) else pytest.approx(162, abs=size))


def test_groups_are_as_likely_to_be_drawn_as_images_that_stand_alone() -> None:
    groups = np.concatenate([np.arange(1000), 1000 + np.arange(1000) // 5])
    labels = groups % 10
    alone = [np.mean(split(labels, groups, 0.01, 0.15, seed).validation < 1000) for seed in range(20)]
    assert np.mean(alone) == pytest.approx(0.5, abs=0.02)


def test_a_group_that_would_be_too_many_is_passed_over_where_others_will_do() -> None:
    groups = np.where((np.arange(1000) >= 500) & (np.arange(1000) < 900), 500, np.arange(1000))
    for seed in range(5):
        parts = split(np.repeat([0, 1], 500), groups, 0.01, 0.15, seed)
        assert (len(parts.fit), len(parts.held_back), len(parts.validation)) == (510, 90, 400)
    all_large = np.arange(1000) // 300
    assert len(split(np.zeros(1000, int), all_large, 0.01, 0.15, 0).validation) == 400  # the last has a hundred


def test_each_class_has_its_share_in_validation() -> None:
    labels = np.repeat(np.arange(10), 200)
    parts = split(labels, np.arange(2000), 0.01, 0.15, 0)
    assert len(parts.validation) == 800
    counts = np.bincount(labels[parts.validation])
    assert counts.min() >= 79
    assert counts.max() <= 81


@pytest.mark.parametrize(
    ("n", "fpr", "validation"), [(495, 0.01, 199), (500, 0.01, 200), (400, 0.01, 160), (300, 0.01, 120), (2000, 0.01, 800), (480, 0.05, 192)]
)
def test_a_few_images_more_go_to_validation_where_they_bring_the_next_rank(n: int, fpr: float, validation: int) -> None:
    assert len(split(labels_of(n, 10), np.arange(n), fpr, 0.15, 0).validation) == validation


def test_the_seed_decides() -> None:
    labels, groups = labels_of(500, 10), np.arange(500)
    assert np.array_equal(split(labels, groups, 0.01, 0.15, 7).fit, split(labels, groups, 0.01, 0.15, 7).fit)
    assert not np.array_equal(split(labels, groups, 0.01, 0.15, 7).fit, split(labels, groups, 0.01, 0.15, 8).fit)


@pytest.mark.parametrize(("n", "fpr"), [(100, 0.01), (164, 0.01), (1000, 0.001)])
def test_a_target_out_of_reach_says_what_can_be_reached_and_what_would_be_needed(n: int, fpr: float) -> None:
    with pytest.raises(FprUnreachable, match=rf"{n} images cannot promise.*bring at least"):
        split(labels_of(n, 10), np.arange(n), fpr, 0.15, 0)


def test_one_image_more_than_the_least_is_enough() -> None:
    assert len(split(labels_of(165, 10), np.arange(165), 0.01, 0.15, 0).validation) == 99


@given(n=st.integers(100, 2000), share=st.floats(0.05, 1.0), seed=st.integers(0, 20))
def test_a_sample_has_the_share_of_each_class(n: int, share: float, seed: int) -> None:
    labels, rows = labels_of(n, 4, seed), np.arange(0, n, 2)
    kept = sample(rows, labels, share, seed)
    assert len(kept) == round(share * len(rows))
    assert set(kept.tolist()) <= set(rows.tolist())
    wanted, found = np.bincount(labels[rows], minlength=4) * share, np.bincount(labels[kept], minlength=4)
    assert np.abs(wanted - found).max() <= 2
