"""A promise that is kept is counted as kept, and one that is broken is not."""

from __future__ import annotations

import pytest
import torch

from benchmarks.promise import divided
from models.threshold import conformal_threshold


@pytest.mark.parametrize(("n", "target"), [(200, 0.005), (200, 0.05), (500, 0.01)])
def test_exchangeable_scores_keep_it(n: int, target: float) -> None:
    scores = torch.randn(4000, generator=torch.Generator().manual_seed(1)).double()
    found = divided(scores, n, target)
    assert found["judged"] == 1000
    assert found["mean_rate"] == pytest.approx(target, rel=0.15)
    assert found["within"] > 0.87  # 90% of 1,000 divisions, give or take three standard errors
    assert found["within_few"] > 0.84


def test_scores_that_sink_after_the_threshold_was_set_break_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_better_ones(scores: torch.Tensor, target: float) -> object:
        return conformal_threshold(scores + 0.5, target)

    monkeypatch.setattr("benchmarks.promise.conformal_threshold", of_better_ones)
    found = divided(torch.randn(4000, generator=torch.Generator().manual_seed(1)).double(), 500, 0.05)
    assert found["mean_rate"] > 0.1
    assert found["within"] < 0.1
