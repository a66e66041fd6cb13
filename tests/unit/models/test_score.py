"""The score against the paper's formula, its behaviour where float32 fails, and what fusing adds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.score import geometric_mean, log_confidence, mean_exp, measure_scale, published_score, shortfall, surprise

probability = st.floats(0.001, 0.999)


def paper_score(x: float, y: float, c: float) -> float:
    first = y / (c * x)
    return min(first, (1 - x) / (c - y)) if y < c else first


def log_score(x: float, y: float, c: float) -> float:
    one = torch.tensor([x], dtype=torch.float64)
    return published_score(one.log(), (1 - one).log(), torch.tensor([y], dtype=torch.float64).log(), c).item()


@given(x=probability, y=probability, c=st.sampled_from([0.2, 0.4, 0.5]))
def test_is_the_logarithm_of_the_published_formula(x: float, y: float, c: float) -> None:
    assert math.exp(log_score(x, y, c)) == pytest.approx(paper_score(x, y, c), rel=1e-9)


def test_is_low_where_the_expert_agrees_and_the_auxiliary_does_not() -> None:
    assert log_score(0.99, 0.02, 0.5) < log_score(0.02, 0.95, 0.5)


def test_a_saturated_expert_does_not_reject_an_image_that_the_auxiliary_is_sure_of() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 3] = 60.0  # softmax is exactly 1.0 in float32, and 1 - x exactly 0
    log_x, log_not_x = log_confidence(logits, torch.tensor([3]))
    value = published_score(log_x, log_not_x, torch.tensor([math.log(0.95)], dtype=torch.float64), 0.5)
    assert value.item() == pytest.approx(math.log(0.95 / 0.5))


@pytest.mark.parametrize("gap", [0.0, 30.0, 100.0, 800.0, 1e4])
@pytest.mark.parametrize("experts", [1, 3])
def test_is_finite_however_far_the_logits_are_apart(gap: float, experts: int) -> None:
    logits = torch.zeros(experts, 2, 10)
    logits[:, 0, 3], logits[:, 1, 3] = gap, -gap
    log_x, log_not_x = geometric_mean(*log_confidence(logits, torch.tensor([3, 3])))
    for log_y in (0.0, -gap, -1e-9):
        assert published_score(log_x, log_not_x, torch.full((2,), log_y, dtype=torch.float64), 0.5).isfinite().all()


def test_the_geometric_mean_is_exact_where_large_logits_are_near_one_another() -> None:
    logits = torch.tensor([[[3000.0, 3000.0 - 29.5]], [[3000.0, 3000.0 - 29.5]]])
    _, log_not_x = geometric_mean(*log_confidence(logits, torch.tensor([0])))
    assert log_not_x.item() == pytest.approx(-29.5, abs=1e-6)


def test_is_not_finite_where_a_network_gave_nan() -> None:
    log_x, log_not_x = log_confidence(torch.full((1, 10), math.nan), torch.tensor([3]))
    assert not published_score(log_x, log_not_x, torch.zeros(1, dtype=torch.float64), 0.5).isfinite().any()


@given(values=st.lists(probability, min_size=2, max_size=5))
def test_the_geometric_mean_of_experts_is_one(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64)[:, None]
    log_x, log_not_x = geometric_mean(x.log(), (1 - x).log())
    mean = math.prod(values) ** (1 / len(values))
    assert log_x.exp().item() == pytest.approx(mean, rel=1e-9)
    assert log_not_x.exp().item() == pytest.approx(1 - mean, rel=1e-6)


def test_one_alarming_kind_of_evidence_is_enough_and_none_cancels_another() -> None:
    calm, usual, alarming = (torch.tensor([z], dtype=torch.float64) for z in (-3.0, 0.0, 40.0))
    assert surprise(usual, usual, alarming) > surprise(usual, usual, usual) + 30
    assert surprise(calm, calm, alarming).item() == pytest.approx(surprise(usual, usual, alarming).item(), abs=2.0)


def test_one_alarming_way_of_measuring_is_enough_and_the_others_add_no_noise() -> None:
    usual, alarming = torch.tensor([0.0, 1.0, -1.0]).double(), torch.tensor([0.0, 40.0, -1.0]).double()
    assert mean_exp(alarming[:, None]).item() == pytest.approx(40 - math.log(3), abs=1e-6)
    assert usual.min() < mean_exp(usual[:, None]).item() < usual.max()
    assert mean_exp(usual[1:2, None]).item() == pytest.approx(1.0)  # one way is itself


def test_surprise_grows_beyond_anything_seen_and_stays_finite() -> None:
    scale = measure_scale(torch.rand(100, dtype=torch.float64))
    found = surprise(scale.z(torch.tensor([-1e9, 0.5, 2.0, 1e3, 1e9], dtype=torch.float64)))
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert (found.diff() > 0).all()


def test_a_clean_image_as_suspicious_as_the_average_beyond_the_median_has_z_1() -> None:
    scale = measure_scale(torch.linspace(0, 2, 101, dtype=torch.float64))
    assert scale.z(torch.tensor([1.0, 1.5], dtype=torch.float64)).tolist() == pytest.approx([0.0, 1.0], abs=0.02)


def test_evidence_that_is_the_same_for_all_clean_images_has_a_usable_scale() -> None:
    assert measure_scale(torch.full((50,), 3.0, dtype=torch.float64)).excess > 0


@pytest.mark.parametrize(("gap", "classes"), [(60.0, 10), (1e4, 10), (1e4, 2), (0.0, 2), (1e30, 1000)])
def test_how_far_the_auxiliary_falls_short_is_known_however_sure_the_suspect_is(gap: float, classes: int) -> None:
    logits = torch.zeros(1, classes)
    logits[0, 0] = gap
    log_y = torch.tensor([0.25], dtype=torch.float64).log()
    found = shortfall(logits, torch.tensor([0]), log_y, (1 - log_y.exp()).log())
    assert found.item() == pytest.approx(gap - math.log(classes - 1) + math.log(3))
