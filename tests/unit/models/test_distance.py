"""The feature distance: chi-squared on the data it was fitted to, large away from it, usable from few images."""

from __future__ import annotations

import pytest
import torch

from models.distance import fit_distance, penultimate


def clusters(n: int, d: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    mixing = torch.randn(d, d, generator=source) / d**0.5
    centres = 5 * torch.randn(classes, d, generator=torch.Generator().manual_seed(1))
    return centres[labels] + torch.randn(n, d, generator=source) @ mixing, labels


def test_squared_distances_of_its_own_class_average_the_dimension() -> None:
    features, labels = clusters(4000, 16, 4)
    assert fit_distance(features, labels, 4)(features, labels).mean().item() == pytest.approx(16, rel=0.15)  # shrinking takes a little


def test_features_of_another_class_are_far() -> None:
    features, labels = clusters(1000, 16, 4)
    distance = fit_distance(features, labels, 4)
    assert distance(features, (labels + 1) % 4).min() > distance(features, labels).max()


@pytest.mark.parametrize(("n", "d"), [(50, 200), (20, 64), (4, 8)], ids=str)
def test_fewer_images_than_dimensions_still_give_finite_distances(n: int, d: int) -> None:
    features, labels = clusters(n, d, 3)
    found = fit_distance(features, labels, 3)(features, labels)
    assert found.isfinite().all()
    assert (found >= 0).all()


def test_a_class_without_images_has_the_mean_of_all() -> None:
    features, labels = clusters(300, 8, 3)
    torch.testing.assert_close(fit_distance(features, labels, 5).means[4], features.mean(0))


def test_constant_features_do_not_divide_by_zero() -> None:
    assert fit_distance(torch.ones(50, 4), torch.zeros(50, dtype=torch.int64), 2)(torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 4, 4), (2, 5, 8)], ids=["vectors", "maps", "tokens"])
def test_maps_and_tokens_become_one_vector_an_image(shape: tuple[int, ...]) -> None:
    assert penultimate(torch.randn(shape)).shape == (2, 8)
