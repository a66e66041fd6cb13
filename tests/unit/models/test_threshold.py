"""The threshold against its promise."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import FprUnreachable
from models.threshold import COUNTED, conformal_threshold, least_fpr, rejections_expected


@given(n=st.integers(99, 400), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_threshold_rejects_exactly_rank_minus_one_validation_images(n: int, seed: int) -> None:
    scores = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = conformal_threshold(scores, 0.01)
    assert found.rank == (n + 1) // 100
    assert int((scores < found.value).sum()) == found.rank - 1
    assert found.expected == found.rank / (len(scores) + 1) <= found.target_fpr


def test_the_promise_is_kept_on_average_and_lies_in_its_interval_nine_times_in_ten() -> None:
    source = torch.Generator().manual_seed(0)
    realised, inside = [], 0
    for _ in range(2000):
        found = conformal_threshold(torch.rand(200, dtype=torch.float64, generator=source), 0.05)
        realised.append(found.value)  # of uniform scores, the share below the threshold is the threshold
        share = int((torch.rand(COUNTED, generator=source) < found.value).sum()) / COUNTED
        inside += found.interval[0] <= share <= found.interval[1]
    assert sum(realised) / 2000 == pytest.approx(10 / 201, rel=0.03)
    assert 0.89 <= inside / 2000 <= 0.94


def test_a_target_out_of_reach_names_the_least_that_can_be_promised() -> None:
    with pytest.raises(FprUnreachable, match=r"0\.00498 is the least.*999 validation images"):
        conformal_threshold(torch.zeros(200), 0.001)


@pytest.mark.parametrize(("n", "low", "high"), [(500, 0.004, 0.018), (1000, 0.005, 0.016), (2000, 0.007, 0.014)])
def test_intervals_at_one_percent_are_the_known_ones(n: int, low: float, high: float) -> None:
    """Of images without end, or nearly; of as many as are promised they are a little wider."""
    found = conformal_threshold(torch.arange(n, dtype=torch.float64), 0.01)
    few, many = rejections_expected(found, 200_000)
    assert few / 200_000 == pytest.approx(low, abs=5e-4)
    assert many / 200_000 == pytest.approx(high, abs=6e-4)
    assert low / 2 < found.interval[0] < few / 200_000
    assert many / 200_000 < found.interval[1] < 1.3 * high


def test_expected_rejections_cover_what_simulation_gives() -> None:
    found = conformal_threshold(torch.arange(800, dtype=torch.float64), 0.01)
    low, high = rejections_expected(found, 400)
    source = torch.Generator().manual_seed(1)
    inside = 0
    for _ in range(1000):
        validation = torch.rand(800, generator=source).sort().values[found.rank - 1]
        inside += low <= int((torch.rand(400, generator=source) < validation).sum()) <= high
    assert 0.88 <= inside / 1000 <= 0.99  # counts are whole, so the interval holds a little more than its level


def test_reasoning_about_promises_does_not_import_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, service.cli, service.demo; sys.exit('torch' in sys.modules)"], check=True)


def test_the_least_rate_that_is_named_can_be_asked_for() -> None:
    for n in range(1, 3000):
        least = least_fpr(n)
        assert 1 / (n + 1) <= least < 1.01 / (n + 1)
        assert float(f"{least:g}") == least
        assert conformal_threshold(torch.arange(n).double(), least).rank == 1


@pytest.mark.parametrize("target", [1e-6, 1e-300, 5e-324])
def test_a_rate_however_small_is_refused_with_what_can_be_promised(target: float) -> None:
    with pytest.raises(FprUnreachable, match=r"is the least\. Ask for that, or bring at least [0-9]{6,13} validation images"):
        conformal_threshold(torch.rand(200), target)
