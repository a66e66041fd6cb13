"""The feature distance: chi-squared on the data it was fitted to, large away from it, usable from few images."""

from __future__ import annotations

import pytest
import torch

from models.distance import LEAST_SPREAD, MOST, fit_distance, vectors


def clusters(n: int, d: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    mixing = torch.randn(d, d, generator=source) / d**0.5
    centres = 5 * torch.randn(classes, d, generator=torch.Generator().manual_seed(1))
    return centres[labels] + torch.randn(n, d, generator=source) @ mixing, labels


def test_squared_distances_of_its_own_class_average_the_dimension() -> None:
    features, labels = clusters(4000, 16, 4)
    assert fit_distance(features, labels, 4).squared(features, labels).mean().item() == pytest.approx(16, rel=0.15)  # shrinking takes a little


def test_a_class_of_few_and_one_of_wide_images_are_no_farther_than_others() -> None:
    """Of classes with 4, 40 and 400 images, and one that scatters twice as wide, images that come later are as far as is usual."""
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([4, 40, 400, 100]))
    source = torch.Generator().manual_seed(0)
    centres, width = 20 * torch.randn(4, 32, generator=source), torch.tensor([1.0, 1.0, 1.0, 2.0])

    def drawn(of: torch.Tensor) -> torch.Tensor:
        return centres[of] + width[of, None] * torch.randn(len(of), 32, generator=source)

    distance, later = fit_distance(drawn(labels), labels, 4), torch.arange(4).repeat_interleave(500)
    usual = distance(drawn(later), later).view(4, 500).mean(1)
    assert usual[1:].tolist() == pytest.approx([1, 1, 1], rel=0.25)
    assert 0.5 < usual[0] < 2  # four images tell little of their spread
    squared = distance.squared(drawn(later), later).view(4, 500).mean(1)
    assert squared.max() > 2.5 * squared.min()


def test_the_spread_of_a_class_is_the_mean_distance_of_its_images_from_the_mean_of_the_others() -> None:
    """A class of one, of two and of five images; the mean of all counts as one image more, of the mean and of the spread."""
    labels = torch.tensor([0] + [1] * 2 + [2] * 5 + [3] * 200)
    features = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(8)[labels]
    distance = fit_distance(features, labels, 4)
    whitened = (features - features.mean(0)) @ distance.whitening.float()
    apart = torch.empty(len(labels))
    for row, label in enumerate(labels):
        others = (labels == label) & (torch.arange(len(labels)) != row)
        apart[row] = (whitened[row] - whitened[others].sum(0) / (others.sum() + 1)).square().sum()
    expected = [(apart[labels == label].sum() + apart.mean()) / ((labels == label).sum() + 1) for label in range(4)]
    assert distance.spread.tolist() == pytest.approx([max(each.item(), LEAST_SPREAD * apart.mean().item()) for each in expected], rel=0.02)  # bfloat16


def test_near_duplicates_do_not_make_a_class_look_tight() -> None:
    """Another image of a class whose images were all but the same is not much farther than another image of other classes."""
    labels = torch.arange(400) % 8
    source = torch.Generator().manual_seed(0)
    features = torch.randn(400, 16, generator=source) + 10 * torch.eye(16)[labels]
    features[labels == 0] = features[0] + 0.01 * torch.randn(50, 16, generator=source)
    distance = fit_distance(features, labels, 8)
    later = torch.randn(400, 16, generator=source) + 10 * torch.eye(16)[labels]
    usual = torch.stack([distance(later, labels)[labels == label].mean() for label in range(8)])
    assert usual[0] < 6 * usual[1:].mean()


def test_an_image_of_a_class_without_images_is_as_far_as_images_are_from_the_mean_of_all() -> None:
    features, labels = clusters(300, 8, 3)
    distance = fit_distance(features, labels, 4)
    assert distance(features, torch.full_like(labels, 3)).mean().item() == pytest.approx(1, rel=0.05)


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
    assert fit_distance(features, labels, 5)(features.mean(0, keepdim=True), torch.tensor([4])).item() == pytest.approx(0, abs=1e-6)


def test_wide_features_are_told_apart_in_fewer_dimensions() -> None:
    features, labels = clusters(600, 2 * MOST, 4)
    distance = fit_distance(features, labels, 4)
    assert distance.whitening.shape == (2 * MOST, MOST)
    assert distance(features, (labels + 1) % 4).min() > distance(features, labels).max()


def test_constant_features_do_not_divide_by_zero() -> None:
    assert fit_distance(torch.ones(50, 4), torch.zeros(50, dtype=torch.int64), 2)(torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "dimensions"),
    [((2, 8), 8), ((2, 8, 1, 1), 8), ((2, 8, 4, 4), 32), ((2, 8, 5, 7), 32), ((2, 4, 4, 8), 32), ((2, 5, 8), 8)],
    ids=["vectors", "one place", "maps", "odd maps", "channels last", "tokens"],
)
def test_maps_and_tokens_become_one_vector_an_image(shape: tuple[int, ...], dimensions: int) -> None:
    assert vectors(torch.randn(shape)).shape == (2, dimensions)


def test_maps_with_channels_last_are_averaged_over_the_same_fields() -> None:
    maps = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(vectors(maps.permute(0, 2, 3, 1)), vectors(maps))
